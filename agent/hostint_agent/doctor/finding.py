# SPDX-License-Identifier: Apache-2.0
"""What one check of `hostint-agent doctor` found, and what to do about it."""

import errno
from dataclasses import dataclass
from typing import Literal

Result = Literal["ok", "warning", "failure"]
RIGHTS = "run doctor as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"


@dataclass(frozen=True, slots=True)
class Finding:
    """Names of the fields are keys of `--json`. `remedy` is empty where nothing has to be done."""

    check: str
    result: Result
    found: str
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    """As it should be."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, remedy: str) -> Finding:
    """The agent works, but not as well or as completely as it could."""
    return Finding(check, "warning", found, remedy)


def failure(check: str, found: str, remedy: str) -> Finding:
    """The agent cannot work like this, or it could not be looked at."""
    return Finding(check, "failure", found, remedy)


def unseen(check: str, error: OSError) -> Finding:
    """It could not be looked at."""
    where = f"{error.filename}: " if error.filename else ""
    refused = error.errno in (errno.EPERM, errno.EACCES)
    remedy = RIGHTS if refused else "mend this, then run doctor again"
    return failure(check, f"{where}{error.strerror or error}", remedy)
