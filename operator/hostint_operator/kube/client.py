# SPDX-License-Identifier: Apache-2.0
"""The port to the API server: plain requests, server-side apply and streams, with one error type.

Typed models are deliberately not used: callers parse the bytes they need with their own pruned models.
"""

import contextlib
import json
import pathlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import pydantic
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

APPLY = "application/apply-patch+yaml"
JSON = "application/json"
# Shorter than what a lease has left when its holder gives up, so that no write outlives leadership.
REQUEST_TIMEOUT_S = 4.0


class ApiError(Exception):
    """A request that did not succeed; `status` is 0 where there was no answer at all."""

    def __init__(self, status: int, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


class SetupError(Exception):
    """There are no usable credentials."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Where the API server is and how to log in; files are named by path."""

    server: str
    ca_file: str | None
    certificate_file: str | None
    key_file: str | None
    token: str | None
    verify: bool


class _Status(pydantic.BaseModel):
    message: str = ""
    reason: str = ""


async def _configuration(kubeconfig: pathlib.Path | None) -> kubernetes_client.Configuration:
    configuration = kubernetes_client.Configuration()
    try:
        if kubeconfig is None:
            # Re-reads the mounted token every minute by itself.
            kubernetes_config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        else:
            await kubernetes_config.load_kube_config(  # type: ignore[no-untyped-call]
                str(kubeconfig), client_configuration=configuration, persist_config=False
            )
    except (kubernetes_config.ConfigException, OSError) as error:
        where = f"kubeconfig '{kubeconfig}'" if kubeconfig else "the pod's service account"
        raise SetupError(f"{where}: {error}") from error
    return configuration


async def credentials(kubeconfig: pathlib.Path | None) -> Credentials:
    """Read the credentials, of the pod's own service account if no file is named."""
    configuration = await _configuration(kubeconfig)
    token = configuration.api_key.get("BearerToken") or ""
    return Credentials(
        server=configuration.host,
        ca_file=configuration.ssl_ca_cert,
        certificate_file=configuration.cert_file,
        key_file=configuration.key_file,
        token=token.removeprefix("Bearer ").removeprefix("bearer ") or None,
        verify=bool(configuration.verify_ssl),
    )


@contextlib.asynccontextmanager
async def connect(kubeconfig: pathlib.Path | None) -> AsyncIterator["Api"]:
    """Open a client, for the pod's own service account if no file is named."""
    configuration = await _configuration(kubeconfig)
    async with kubernetes_client.ApiClient(configuration) as client:
        yield Api(client)


class Api:
    """Requests to one API server."""

    def __init__(self, client: kubernetes_client.ApiClient) -> None:
        self._client = client

    async def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None,
        content_type: str,
        timeout_s: float,
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": JSON}
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            request = await self._client.param_serialize(
                method,
                path,
                query_params=list(query.items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            answer = await self._client.call_api(*request, _request_timeout=timeout_s)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _no_answer(error) from error
        response: aiohttp.ClientResponse = answer.response
        if response.status >= 300:
            raise await _refusal(response)
        return response

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = JSON,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> bytes:
        """Send one request and return the body of the answer; raise ApiError."""
        response = await self._open(method, path, query or {}, body, content_type, timeout_s)
        async with response:
            try:
                return await response.read()
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise _no_answer(error) from error

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, query: Mapping[str, str], timeout_s: float
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """Open a watch; reading from it raises what aiohttp raises."""
        response = await self._open("GET", path, query, None, JSON, timeout_s)
        async with response:
            yield response.content

    async def apply(self, path: str, intent: Mapping[str, Any], manager: str) -> dict[str, Any]:
        """Server-side apply the whole intent of `manager` and return the object as it is now."""
        answer = await self.request(
            "PATCH",
            path,
            query={"fieldManager": manager, "force": "true"},
            body=intent,
            content_type=APPLY,
        )
        applied: dict[str, Any] = json.loads(answer)
        return applied


def _no_answer(error: Exception) -> ApiError:
    words = str(error) or type(error).__name__
    return ApiError(0, f"no answer from the API server: {words}")


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    async with response:
        try:
            text = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            text = b""
    try:
        message = _Status.model_validate_json(text).message
    except pydantic.ValidationError:
        message = text[:300].decode(errors="replace")
    try:
        retry_after_s = float(response.headers.get("Retry-After", "0"))
    except ValueError:
        retry_after_s = 0.0
    return ApiError(response.status, message or str(response.reason), retry_after_s)
