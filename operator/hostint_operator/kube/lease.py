# SPDX-License-Identifier: Apache-2.0
"""Leadership by a coordination.k8s.io Lease: at most one replica writes at a time."""

import asyncio
import datetime
import json
import random
from typing import Any

import structlog

from hostint_operator.kube import client

log = structlog.get_logger()

NOT_FOUND = 404
RELEASE_TIMEOUT_S = 2.0


class Lease:
    """One candidate for the lease `name`.

    `leading` is set while this candidate leads; `may_write` also looks at the clock. Leadership ends `renew_s` before
    the lease can expire for the others, so that a write which began in time has ended by then.
    Another holder's lease is timed by our own clock, from when we saw it change.
    """

    def __init__(
        self,
        api: client.Api,
        namespace: str,
        name: str,
        identity: str,
        *,
        duration_s: float = 15.0,
        renew_s: float = 5.0,
    ) -> None:
        self.leading = asyncio.Event()
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._duration_s = duration_s
        self._renew_s = renew_s
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._seen: tuple[str, str] | None = None
        self._seen_at = 0.0
        self._deadline = 0.0

    def may_write(self) -> bool:
        """Whether a write that begins now ends before another candidate can lead."""
        return self.leading.is_set() and asyncio.get_running_loop().time() < self._deadline

    async def hold(self) -> None:
        """Become leader and stay it; return only when leadership is lost; release the lease when cancelled."""
        try:
            await self._hold()
        finally:
            was_leading = self.leading.is_set()
            self.leading.clear()
            if was_leading:
                await self._release()

    async def _hold(self) -> None:
        loop = asyncio.get_running_loop()
        failing = False
        while True:
            started_at = loop.time()
            try:
                async with asyncio.timeout_at(self._end_of(started_at + self._renew_s)):
                    held = await self._claim(self._identity)
            except (client.ApiError, TimeoutError) as error:
                if not failing:
                    log.warning("lease not renewed, retrying", lease=self._name, error=str(error))
                failing = True
            else:
                failing = False
                if not self._claimed(held, started_at):
                    return
            pause_s = self._renew_s * random.uniform(0.3, 0.5)  # noqa: S311
            await asyncio.sleep(max(self._end_of(loop.time() + pause_s) - loop.time(), 0))
            if self.leading.is_set() and not self.may_write():
                log.error("leadership lost, the lease could not be renewed", lease=self._name)
                return

    def _end_of(self, when: float) -> float:
        """Return when to stop waiting for something: a leader never waits beyond its deadline."""
        return min(when, self._deadline) if self.leading.is_set() else when

    def _claimed(self, held: bool, started_at: float) -> bool:
        """Take note of the answer to a claim; False if leadership is lost."""
        if held:
            self._deadline = started_at + self._duration_s - self._renew_s
            if not self.leading.is_set():
                log.info("leading", lease=self._name, identity=self._identity)
                self.leading.set()
        elif self.leading.is_set():
            log.error("leadership taken by another replica", lease=self._name)
            return False
        return True

    async def _release(self) -> None:
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                await self._claim("")
        except (client.ApiError, TimeoutError) as error:
            log.warning("lease not released", lease=self._name, error=str(error))

    async def _claim(self, holder: str) -> bool:
        """Write `holder` into the lease if it is free or ours; an empty holder frees it."""
        try:
            current = json.loads(await self._api.request("GET", f"{self._collection}/{self._name}"))
        except client.ApiError as error:
            if error.status != NOT_FOUND:
                raise
            await self._create(holder)
            return True
        spec: dict[str, Any] = current.setdefault("spec", {})
        if not self._free(spec):
            return False
        now = _micro_time()
        if spec.get("holderIdentity", "") != holder:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = spec.get("leaseTransitions", 0) + 1
        spec["holderIdentity"] = holder
        spec["renewTime"] = now
        spec["leaseDurationSeconds"] = max(int(self._duration_s), 1)
        # The body carries the resourceVersion that was read, so that of two candidates one gets a
        # conflict, which counts as an attempt that failed.
        await self._api.request("PUT", f"{self._collection}/{self._name}", body=current)
        return True

    def _free(self, spec: dict[str, Any]) -> bool:
        now = asyncio.get_running_loop().time()
        stamp = (spec.get("holderIdentity") or "", spec.get("renewTime") or "")
        if stamp != self._seen:
            self._seen, self._seen_at = stamp, now
        duration_s = float(spec.get("leaseDurationSeconds") or self._duration_s)
        return stamp[0] in ("", self._identity) or now - self._seen_at > duration_s

    async def _create(self, holder: str) -> None:
        now = _micro_time()
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": max(int(self._duration_s), 1),
                "acquireTime": now,
                "renewTime": now,
                "leaseTransitions": 0,
            },
        }
        await self._api.request("POST", self._collection, body=lease)


def _micro_time() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
