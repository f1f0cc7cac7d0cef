# SPDX-License-Identifier: Apache-2.0
"""Remove every program, map and link of ours from this network namespace, and nothing else."""

import shutil
from pathlib import Path

import pyroute2

from hostint_agent import attach


def unload(pin_dir: Path) -> list[str]:
    """Detach and unpin; one line for each thing removed, none if there was nothing. Raises OSError."""
    removed = []
    links = pin_dir / "links"
    # the links first, so that no program runs with half of its maps gone
    if links.is_dir():
        for pin in sorted(links.iterdir()):
            pin.unlink()
            removed.append(f"link {pin.name}")
        links.rmdir()
    with pyroute2.IPRoute() as netlink:
        for message in netlink.get_links():
            for direction in attach.remove_filters(netlink, message["index"]):
                removed.append(f"filter on {message.get_attr('IFLA_IFNAME')} {direction}")
    for layout in sorted(pin_dir.iterdir()) if pin_dir.is_dir() else ():
        for kind in ("programs", "maps"):
            pins = sorted((layout / kind).iterdir()) if (layout / kind).is_dir() else []
            removed += [f"{kind[:-1]} {pin.name}" for pin in pins]
        shutil.rmtree(layout)
    if pin_dir.is_dir():
        pin_dir.rmdir()
    return removed
