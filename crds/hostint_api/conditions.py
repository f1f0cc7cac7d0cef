# SPDX-License-Identifier: Apache-2.0
"""Conditions as the Kubernetes API conventions want them. Pure; the time is an argument."""

import datetime
from collections.abc import Mapping
from typing import Any

_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def set_condition(
    before: Mapping[str, Any] | None,
    kind: str,
    status: bool | None,
    reason: str,
    message: str,
    generation: int,
    now: datetime.datetime,
) -> dict[str, Any]:
    """The condition `kind` as it is to be written; `status` None is Unknown.

    `before` is the condition of that type as it was, if there was one: the transition time moves only when the status does.
    """
    text = "Unknown" if status is None else str(status)
    unchanged = before is not None and before.get("status") == text
    since = before["lastTransitionTime"] if before and unchanged else now.strftime(_FORMAT)
    return {
        "type": kind,
        "status": text,
        "reason": reason,
        "message": message,
        "observedGeneration": generation,
        "lastTransitionTime": since,
    }
