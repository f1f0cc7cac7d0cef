# SPDX-License-Identifier: Apache-2.0
"""Every drop reason of the running kernel has an INT code, and every code a name."""

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
