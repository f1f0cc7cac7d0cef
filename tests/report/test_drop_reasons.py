# SPDX-License-Identifier: Apache-2.0
"""Every drop reason of the running kernel has an INT code, every code a name, and people can read it all."""

import re
from pathlib import Path

from hostint_agent import kernel
from hostint_report import drop_reasons


def test_every_reason_of_this_kernel_has_a_code():
    names = set(kernel.drop_reason_names().values())
    assert names, "this kernel names no drop reasons"
    assert names - set(drop_reasons.BY_KERNEL_NAME) == set()


def test_every_code_has_words():
    codes = {treatment.code for treatment in drop_reasons.BY_KERNEL_NAME.values()}
    codes |= {drop_reasons.UNMAPPED, drop_reasons.OTHER_SUBSYSTEM.code, drop_reasons.TTL_EXPIRED}
    assert codes <= set(drop_reasons.NAMES)


def test_a_reason_of_a_newer_kernel_is_unmapped_but_reported():
    treatment = drop_reasons.for_kernel_name("SOMETHING_OF_NEXT_YEAR")
    assert (treatment.code, treatment.reported) == (255, True)


def test_only_queues_and_devices_are_believed_after_egress():
    after = {n for n, t in drop_reasons.BY_KERNEL_NAME.items() if t.after_egress}
    assert {"QDISC_DROP", "TC_EGRESS", "FULL_RING"} <= after
    assert not after & {"NO_SOCKET", "NETFILTER_DROP", "IP_INNOROUTES", "SOCKET_RCVBUFF"}


NOT_DEATHS = {"SKB_NOT_DROPPED_YET", "SKB_CONSUMED", "SUBSYS_MASK", "MAX"}


def documented() -> dict[str, tuple[int, str, drop_reasons.Treatment]]:
    """(code, its words, treatment) by kernel reason, as docs/drop-reasons.md tells them."""
    page = Path(__file__).parents[2] / "docs" / "drop-reasons.md"
    table = page.read_text().split("## What to expect")[0]
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not re.fullmatch(r"(`[A-Z0-9_]+` ?)+", cells[2] if len(cells) == 5 else ""):
            continue
        code, words, names, reported, queue = cells
        treatment = drop_reasons.Treatment(
            int(code), reported.startswith("yes"), queue == "Q", "behind egress" in reported
        )
        for name in names.split():
            assert name.strip("`") not in found, f"{name} is listed twice"
            found[name.strip("`")] = (int(code), words, treatment)
    return found


def test_the_documentation_has_every_reason_as_it_is_treated():
    meant = {
        name: (treatment.code, drop_reasons.name_of(treatment.code), treatment)
        for name, treatment in drop_reasons.BY_KERNEL_NAME.items()
        if name not in NOT_DEATHS
    }
    assert documented() == meant


def test_no_two_codes_have_the_same_words():
    assert len(set(drop_reasons.NAMES.values())) == len(drop_reasons.NAMES)


def test_what_is_no_loss_is_not_reported():
    """A copy that nobody waited for, bytes that had come before, data that a socket had and never read."""
    silent = {name for name, t in drop_reasons.BY_KERNEL_NAME.items() if not t.reported}
    assert {"OTHERHOST", "PACKET_SOCK_ERROR", "TCP_OLD_DATA", "DUP_FRAG", "QUEUE_PURGE"} <= silent
    assert not silent & {
        "NETFILTER_DROP",
        "NO_SOCKET",
        "NOT_SPECIFIED",
        "QDISC_DROP",
        "PKT_TOO_BIG",
    }
