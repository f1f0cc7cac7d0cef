# SPDX-License-Identifier: Apache-2.0
"""Mirror of bpf/types.h: structs, enums and limits shared with the programs; tests/agent/test_bpf_types.py proves it equal."""

import ctypes
import enum

NR_SLOTS = 65536
NR_FLOW_SETS = 16384
FLOW_WAYS = 4
MAX_WATCHLISTS = 256
MAX_COLLECTORS = 16
REPORT_BYTES = 192
SNAP_BYTES = 128
DROP_REASONS = 512
RINGS_PER_CPU = 2
MAX_DROP_FUNCTIONS = 256
FUNCTION_NAME_BYTES = 56
RATE_USED_BITS = 24


class RingKind(enum.IntEnum):
    """The rings of a CPU."""

    FLOW = 0
    DROP = 1


class ReportEvent(enum.IntFlag):
    """What a watchlist asks to be told, or-ed."""

    FLOW = 1
    DROP = 2
    QUEUE = 4


class ReportFormat(enum.IntEnum):
    """Wire formats."""

    V05 = 0


class RuleAction(enum.IntEnum):
    """What a rule says."""

    NONE = 0
    REPORT = 1
    IGNORE = 2


class FlowKey(ctypes.Structure):
    """The tuple of a packet, as the programs keep it."""

    _fields_ = (
        ("source", ctypes.c_uint32 * 4),
        ("destination", ctypes.c_uint32 * 4),
        ("source_port", ctypes.c_uint16),
        ("destination_port", ctypes.c_uint16),
        ("protocol", ctypes.c_uint8),
        ("family", ctypes.c_uint8),
        ("no_ports", ctypes.c_uint8),
        ("generation", ctypes.c_uint8),
    )


class Verdict(ctypes.Structure):
    """What the classifier says of a packet: all zero if no rule matched."""

    _fields_ = (
        ("rule_id", ctypes.c_uint32),
        ("watchlist", ctypes.c_uint16),
        ("action", ctypes.c_uint16),
    )


class SlotState(enum.IntEnum):
    """How far the packet of a slot got."""

    FREE = 0
    TAKEN = 1
    PENDING = 2
    DELIVERED = 3
    EGRESSED = 4
    SENT = 5
    REWRITTEN = 6


OWNER_STATE = 0x7
OWNER_ADDRESS = 0x00FFFFFFFFFFFFF8
OWNER_WATCHLIST_SHIFT = 56


class Slot(ctypes.Structure):
    """Where a watched packet left its arrival; `owner` holds a SlotState, the packet's address and the watchlist."""

    _fields_ = (
        ("owner", ctypes.c_uint64),
        ("arrival_ns", ctypes.c_uint64),
        ("ifindex", ctypes.c_uint32),
        ("fingerprint", ctypes.c_uint32),
        ("key", FlowKey),
    )


class Flow(ctypes.Structure):
    """Report state of one flow."""

    _fields_ = (
        ("signature", ctypes.c_uint64),
        ("reported_ns", ctypes.c_uint64),
        ("latency_ns", ctypes.c_uint32),
        ("egress", ctypes.c_uint32),
    )


class FlowSet(ctypes.Structure):
    """The flows that share a hash index."""

    _fields_ = (("way", Flow * FLOW_WAYS),)


class Policy(ctypes.Structure):
    """Report settings of one watchlist."""

    _fields_ = (
        ("interval_ns", ctypes.c_uint64),
        ("latency_change_ns", ctypes.c_uint64),
        ("congestion_latency_ns", ctypes.c_uint64),
        ("sample", ctypes.c_uint32),
        ("events", ctypes.c_uint16),
        ("collector", ctypes.c_uint16),
    )


class Collector(ctypes.Structure):
    """Where reports go, as the programs need it."""

    _fields_ = (
        ("reports_per_second", ctypes.c_uint32),
        ("snap_length", ctypes.c_uint16),
        ("format", ctypes.c_uint16),
    )


class RateWindow(ctypes.Structure):
    """Rate limit of one collector: number and use of the current window in one word."""

    _fields_ = (("state", ctypes.c_uint64),)


class TunnelPorts(ctypes.Structure):
    """UDP ports of the tunnels that end on this host; 0: none."""

    _fields_ = (("vxlan", ctypes.c_uint16 * 3), ("geneve", ctypes.c_uint16))


class Config(ctypes.Structure):
    """Settings that are not rules."""

    _fields_ = (
        ("wall_offset_ns", ctypes.c_uint64),
        ("netns_cookie", ctypes.c_uint64),
        ("node_id", ctypes.c_uint32),
        ("enabled", ctypes.c_uint32),
        ("tunnels", TunnelPorts),
        ("skb_dev", ctypes.c_uint32),
        ("skb_head", ctypes.c_uint32),
        ("skb_data", ctypes.c_uint32),
        ("skb_tail", ctypes.c_uint32),
        ("skb_mac_header", ctypes.c_uint32),
        ("skb_network_header", ctypes.c_uint32),
        ("dev_ifindex", ctypes.c_uint32),
        ("dev_net", ctypes.c_uint32),
        ("dev_priv", ctypes.c_uint32),
        ("net_cookie", ctypes.c_uint32),
        ("hold", ctypes.c_uint32),
        ("port_is_ifindex", ctypes.c_uint32),
    )


class DropFlag(enum.IntFlag):
    """How a kernel drop reason is treated, or-ed."""

    REPORT = 1
    AFTER_EGRESS = 2
    QUEUE = 4
    CHECK_TTL = 8
    NOT_ECHO_REPLY = 16
    NOT_GROUP = 32
    OF_COPY = 64
    NOT_ABOVE_IP = 128
    BY_FUNCTION = 256


class DropSite(ctypes.Structure):
    """Key of drop_functions: where the kernel dropped packets, and for which reason."""

    _fields_ = (
        ("location", ctypes.c_uint64),
        ("reason", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class DropFunction(ctypes.Structure):
    """Drops of one DropSite on one CPU."""

    _fields_ = (
        ("count", ctypes.c_uint64),
        ("name", ctypes.c_char * FUNCTION_NAME_BYTES),
    )


class DropReason(ctypes.Structure):
    """What to do about one kernel drop reason."""

    _fields_ = (
        ("flags", ctypes.c_uint16),
        ("code", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 5),
    )


class ReportRecord(ctypes.Structure):
    """One report: finished wire bytes."""

    _fields_ = (("bytes", ctypes.c_uint8 * REPORT_BYTES),)


class ReportIov(ctypes.Structure):
    """struct iovec of the record with the same index."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
    )


class RingPosition(ctypes.Structure):
    """A ring position, alone in its cache line."""

    _fields_ = (
        ("value", ctypes.c_uint64),
        ("asleep", ctypes.c_uint64),
        ("busy", ctypes.c_uint64),
        ("pad", ctypes.c_uint64 * 5),
    )


class ExportCounter(ctypes.Structure):
    """Reports sent and failed, per collector."""

    _fields_ = (
        ("sent", ctypes.c_uint64),
        ("failed", ctypes.c_uint64),
    )


class CounterUser(enum.IntEnum):
    """Programs that count for watchlists."""

    TC = 0
    DROP = 1


NR_COUNTER_USERS = 2


class WatchlistCounters(ctypes.Structure):
    """Counters of one watchlist and user on one CPU."""

    _fields_ = (
        ("watched", ctypes.c_uint64),
        ("reported", ctypes.c_uint64),
        ("suppressed", ctypes.c_uint64),
        ("sampled_out", ctypes.c_uint64),
        ("rate_limited", ctypes.c_uint64),
        ("ring_full", ctypes.c_uint64),
        ("unverified", ctypes.c_uint64),
        ("unresolved", ctypes.c_uint64),
        ("dropped", ctypes.c_uint64),
        ("dropped_late", ctypes.c_uint64),
        ("drops_reported", ctypes.c_uint64),
        ("drops_suppressed", ctypes.c_uint64),
        ("drops_sampled_out", ctypes.c_uint64),
        ("drops_rate_limited", ctypes.c_uint64),
        ("drops_ring_full", ctypes.c_uint64),
        ("drops_not_asked", ctypes.c_uint64),
        ("not_asked", ctypes.c_uint64),
    )


class DatapathCounter(enum.IntEnum):
    """Index into datapath_counters."""

    NOT_IP = 0
    TRUNCATED = 1
    FLOW_EVICTED = 2
    SNAPSHOT_FAILED = 3
    SLOT_BUSY = 4
    STALE_DROP = 5
    DROP_EVICTED = 6
    DROP_SNAPSHOT_FAILED = 7
    DROP_NESTED = 8
    DROP_FUNCTION_UNKNOWN = 9


NR_DATAPATH_COUNTERS = 10
