# SPDX-License-Identifier: Apache-2.0
"""Remove every program, map and link of ours from this network namespace, and nothing else."""

import contextlib
import re
import socket
from pathlib import Path

from hostint_agent import attach, clsact, delivery, loader

_LINK = re.compile(
    "|".join((r"tcx-\d+-(ingress|egress)", attach.DROP_TRACEPOINT, *delivery.LINK_PINS))
)


def unload(pin_dir: Path) -> list[str]:
    """Detach and unpin; one line for each thing removed, none if there was nothing. Raises OSError."""
    removed = []
    links = pin_dir / "links"
    # the links first, so that no program runs with half of its maps gone
    if links.is_dir():
        for pin in sorted(path for path in links.iterdir() if _LINK.fullmatch(path.name)):
            pin.unlink()
            removed.append(f"link {pin.name}")
        _remove_empty(links)
    for ifindex, direction in clsact.remove_all():
        removed.append(f"filter on {_name(ifindex)} {direction}")
    for build in loader.builds(pin_dir):
        for kind in ("programs", "maps"):
            pins = sorted((build / kind).iterdir()) if (build / kind).is_dir() else []
            removed += [f"{kind[:-1]} {pin.name}" for pin in pins]
        loader.remove(build)
    removed += [f"remains {path.name}" for path in loader.remove_remains(pin_dir)]
    if pin_dir.is_dir():
        _remove_empty(pin_dir)
    return removed


def _name(ifindex: int) -> str:
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return f"interface {ifindex}"


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
