# SPDX-License-Identifier: Apache-2.0
"""Drop reasons: INT codes and their names, and which code each kernel reason gets. Pure data.

Codes up to 115 are the numbering of switch.p4-16, which INT switches and their collectors use; 180-184 are those of
int-host-reporter; 192-215 are ours, for what only a host knows; 255 is a kernel reason this table does not know.
docs/drop-reasons.md is the same for people.
"""

from dataclasses import dataclass

UNKNOWN = 0
TTL_EXPIRED = 26
UNMAPPED = 255

NAMES: dict[int, str] = {
    0: "unknown",
    11: "source MAC invalid",
    13: "not for this MAC",
    17: "own MAC as source",
    25: "IP version invalid",
    26: "TTL expired",
    27: "source IP invalid",
    28: "source IP loopback",
    29: "no route",
    30: "IP header length invalid",
    31: "IP checksum",
    32: "loopback address off the host",
    33: "source IP unspecified",
    49: "destination IP unspecified",
    57: "STP blocking",
    70: "packet exceeds MTU",
    71: "queue full",
    73: "active queue management",
    80: "denied by policy",
    82: "reverse path",
    89: "no forwarding entry",
    92: "denied at an egress hook",
    93: "next hop unresolved",
    94: "protocol not handled",
    100: "IPv6 disabled",
    180: "encapsulation failed",
    181: "decapsulation failed",
    182: "L4 checksum",
    183: "IP options",
    192: "host: no socket",
    193: "host: socket closed",
    194: "host: receive buffer full",
    195: "host: accept queue full",
    196: "host: TCP window or sequence",
    197: "host: TCP state",
    198: "host: TCP authentication",
    199: "host: no memory",
    200: "host: malformed header",
    201: "host: reassembly",
    202: "host: device down",
    203: "host: segmentation failed",
    204: "host: neighbour discovery",
    205: "host: L2 filter",
    206: "host: tc configuration",
    207: "host: queue purged",
    208: "host: IPsec policy",
    209: "host: no such L4 protocol",
    210: "host: not IP",
    211: "host: not a packet",
    212: "host: other kernel subsystem",
    213: "destination IP invalid",
    215: "host: device recursion",
    255: "kernel reason without a code",
}


@dataclass(frozen=True, slots=True)
class Treatment:
    """What becomes of one kernel reason.

    `reported`: a report is made without further ado; `queue`: a full queue, the Q bit is set too; `after_egress`: it is
    also believed of a packet that has been handed to its egress device.
    """

    code: int
    reported: bool = True
    queue: bool = False
    after_egress: bool = False


def _table() -> dict[str, Treatment]:
    table: dict[str, Treatment] = {}

    def put(code: int, names: str, **flags: bool) -> None:
        for name in names.split():
            table[name] = Treatment(code, **flags)

    put(0, "NOT_SPECIFIED")
    put(11, "MAC_INVALID_SOURCE")
    put(13, "OTHERHOST", reported=False)
    put(17, "LOCAL_MAC")
    put(200, "IP_INHDR")
    put(27, "IP_INVALID_SOURCE")
    put(32, "IP_LOCALNET")
    put(29, "IP_OUTNOROUTES IP_INNOROUTES IP_INADDRERRORS")
    put(213, "IP_INVALID_DEST")
    put(31, "IP_CSUM")
    put(57, "BRIDGE_INGRESS_STP_STATE")
    put(70, "PKT_TOO_BIG")
    put(
        71,
        "QDISC_DROP QDISC_OVERLIMIT FQ_BAND_LIMIT FQ_HORIZON_LIMIT FQ_FLOW_LIMIT",
        queue=True,
        after_egress=True,
    )
    put(71, "CPU_BACKLOG")
    put(71, "FULL_RING", after_egress=True)
    put(73, "QDISC_CONGESTED CAKE_FLOOD DUALPI2_STEP_DROP", queue=True, after_egress=True)
    put(80, "NETFILTER_DROP SECURITY_HOOK XDP TC_INGRESS")
    put(80, "SOCKET_FILTER", reported=False)
    put(82, "IP_RPFILTER IP_LOCAL_SOURCE")
    put(89, "NO_TX_TARGET")
    put(92, "TC_EGRESS BPF_CGROUP_EGRESS", after_egress=True)
    put(93, "NEIGH_CREATEFAIL NEIGH_FAILED NEIGH_QUEUEFULL NEIGH_DEAD NEIGH_HH_FILLFAIL")
    put(94, "UNHANDLED_PROTO", reported=False)
    put(100, "IPV6DISABLED")
    put(180, "TUNNEL_TXINFO")
    put(181, "VXLAN_INVALID_HDR VXLAN_VNI_NOT_FOUND IP_TUNNEL_ECN")
    put(182, "TCP_CSUM UDP_CSUM ICMP_CSUM SKB_CSUM")
    put(183, "IPV6_BAD_EXTHDR")
    put(192, "NO_SOCKET")
    put(193, "SOCKET_CLOSE", reported=False)
    put(194, "SOCKET_RCVBUFF PROTO_MEM SOCKET_BACKLOG TCP_OFO_QUEUE_PRUNE")
    put(195, "TCP_LISTEN_OVERFLOW")
    put(
        196,
        "TCP_ZEROWINDOW TCP_OVERWINDOW TCP_RFC7323_PAWS TCP_RFC7323_TW_PAWS TCP_RFC7323_TSECR "
        "TCP_INVALID_SEQUENCE TCP_INVALID_END_SEQUENCE TCP_INVALID_ACK_SEQUENCE TCP_ACK_UNSENT_DATA",
    )
    put(
        196,
        "TCP_OLD_DATA TCP_OFOMERGE TCP_RFC7323_PAWS_ACK TCP_OLD_SEQUENCE TCP_OLD_ACK TCP_TOO_OLD_ACK "
        "TCP_OFO_DROP",
        reported=False,
    )
    put(197, "TCP_FLAGS TCP_ABORT_ON_DATA TCP_INVALID_SYN TCP_MINTTL")
    put(197, "TCP_RESET TCP_CLOSE TCP_FASTOPEN", reported=False)
    put(
        198,
        "TCP_AUTH_HDR TCP_MD5NOTFOUND TCP_MD5UNEXPECTED TCP_MD5FAILURE TCP_AONOTFOUND TCP_AOUNEXPECTED "
        "TCP_AOKEYNOTFOUND TCP_AOFAILURE",
    )
    put(199, "NOMEM", after_egress=True)
    put(199, "PFMEMALLOC SKB_UCOPY_FAULT")
    put(200, "PKT_TOO_SMALL DEV_HDR HDR_TRUNC INVALID_PROTO")
    put(201, "FRAG_REASM_TIMEOUT FRAG_TOO_FAR")
    put(201, "DUP_FRAG", reported=False)
    put(202, "DEV_READY", after_egress=True)
    put(203, "SKB_GSO_SEG", after_egress=True)
    put(204, "IPV6_NDISC_FRAG IPV6_NDISC_HOP_LIMIT IPV6_NDISC_BAD_CODE IPV6_NDISC_BAD_OPTIONS")
    put(204, "IPV6_NDISC_NS_OTHERHOST", reported=False)
    put(
        205,
        "UNICAST_IN_L2_MULTICAST TAP_FILTER TAP_TXFILTER VXLAN_ENTRY_EXISTS ARP_PVLAN_DISABLE",
    )
    put(205, "MAC_IEEE_MAC_CONTROL PACKET_SOCK_ERROR", reported=False)
    put(206, "TC_COOKIE_ERROR TC_CHAIN_NOTFOUND TC_RECLASSIFY_LOOP")
    put(207, "QUEUE_PURGE", reported=False)
    put(208, "XFRM_POLICY PSP_INPUT PSP_OUTPUT")
    put(209, "IP_NOPROTO")
    put(
        210,
        "CAN_RX_INVALID_FRAME CANFD_RX_INVALID_FRAME CANXL_RX_INVALID_FRAME",
        reported=False,
    )
    put(211, "UNIX_DISCONNECT UNIX_SKIP_OOB", reported=False)
    put(215, "RECURSION_LIMIT", after_egress=True)
    # not deaths: kept here so that every name of a kernel has an entry
    put(0, "SKB_NOT_DROPPED_YET SKB_CONSUMED SUBSYS_MASK MAX", reported=False)
    return table


BY_KERNEL_NAME = _table()
OTHER_SUBSYSTEM = Treatment(212)


def for_kernel_name(name: str | None) -> Treatment:
    """Treatment of a kernel drop reason by its name without prefix (enum skb_drop_reason); None: this kernel has no such."""
    if name is None:
        return Treatment(UNMAPPED)
    return BY_KERNEL_NAME.get(name, Treatment(UNMAPPED))


def name_of(code: int) -> str:
    """Words for an INT drop reason."""
    return NAMES.get(code, f"code {code}")
