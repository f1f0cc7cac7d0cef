# SPDX-License-Identifier: Apache-2.0
"""Remove every program, map and link of ours from this network namespace, and nothing else."""

import contextlib
import re
import shutil
from pathlib import Path

import pyroute2

from hostint_agent import attach

_BUILD = re.compile(r"[0-9a-f]{16}")
_LINK = re.compile(rf"tcx-\d+-(ingress|egress)|{attach.DROP_TRACEPOINT}")


def builds(pin_dir: Path) -> list[Path]:
    """Directories of pinned programs and maps that are ours: a pin directory may hold what is somebody else's."""
    if not pin_dir.is_dir():
        return []
    return sorted(
        path for path in pin_dir.iterdir() if _BUILD.fullmatch(path.name) and path.is_dir()
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
    with pyroute2.IPRoute() as netlink:
        for message in netlink.get_links():
            name = message.get_attr("IFLA_IFNAME")
            directions = attach.remove_filters(netlink, message["index"])
            removed += [f"filter on {name} {direction}" for direction in directions]
    for build in builds(pin_dir):
        for kind in ("programs", "maps"):
            pins = sorted((build / kind).iterdir()) if (build / kind).is_dir() else []
            removed += [f"{kind[:-1]} {pin.name}" for pin in pins]
        shutil.rmtree(build)
    if pin_dir.is_dir():
        _remove_empty(pin_dir)
    return removed


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
