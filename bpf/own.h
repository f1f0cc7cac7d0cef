/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Telemetry reports are never watched, or a watchlist that matches them feeds itself. What the agent's own sockets send is
 * known by the sockets' cookies, whatever NAT or tunnel it has been through before the first hook. On other nodes and
 * behind other network namespaces a report is known by what it contains: Telemetry Report v0.5 as report.h writes it, with
 * reserved bits and fields that the kernel does not give TC programs: some 70 bits of a flow report, 60 of a drop report.
 */
#pragma once
#include "fingerprint.h"
#include "report.h"

/* version 0, next protocol 1 or 2, reserved bits 0 */
#define V05_FIXED_BITS (~(0x3U << 24 | V05_D | V05_Q | V05_F | 0x3fU))

static __always_inline bool is_sent_by_agent(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);

	return cookie && own_sockets.lookup(&cookie);
}

/* The length of the header of a report that begins like this; 0: it is none. */
static __always_inline __u32 v05_header_bytes(const __u8 *report)
{
	__u32 first = bpf_ntohl(*(const __be32 *)report), kind = first & (V05_NPROTO_DROP | V05_NPROTO_LOCAL);

	if (first & V05_FIXED_BITS)
		return 0;
	if (kind == V05_NPROTO_LOCAL) {
		/* neither dropped, nor queue id and occupancy */
		if ((first & V05_D) || !(first & (V05_F | V05_Q)) || *(const __be32 *)(report + 20))
			return 0;
		return V05_LOCAL_BYTES;
	}
	if (kind == V05_NPROTO_DROP) {
		/* dropped, no queue id, nothing behind the reason */
		if (!(first & V05_D) || report[20] || report[22] || report[23])
			return 0;
		return V05_DROP_BYTES;
	}
	return 0;
}

/* Whether the header of a report may end here: an Ethernet header follows, or nothing, if no packet could be read. */
static __always_inline bool may_end_header(struct __sk_buff *skb, __u32 at)
{
	__be16 type;
	__u8 last;

	if (bpf_skb_load_bytes(skb, at + ETHERNET_HEADER_BYTES - 2, &type, sizeof(type)) < 0)
		return bpf_skb_load_bytes(skb, at - 1, &last, sizeof(last)) == 0;
	return type == bpf_htons(ETHERTYPE_IPV4) || type == bpf_htons(ETHERTYPE_IPV6) ||
	       type == bpf_htons(ETHERTYPE_VLAN) || type == bpf_htons(ETHERTYPE_QINQ);
}

/* Where the UDP payload of a packet, or of the one in a tunnel, begins; 0: there is none. */
static __always_inline __u32 udp_payload(struct __sk_buff *skb, const struct flow_key *key,
					 const struct packet_offsets *offsets)
{
	__u8 ip[IPV6_BYTES] = {};

	if (!offsets->inner)
		return key->protocol == PROTO_UDP && !key->no_ports ? offsets->transport + UDP_BYTES : 0;
	/* an inner IPv4 packet may be shorter than an IPv6 header, but not if it holds a report */
	if (bpf_skb_load_bytes(skb, offsets->inner, ip, sizeof(ip)) < 0)
		return 0;
	if (ip[0] >> 4 == 4)
		return ip[9] == PROTO_UDP ? offsets->inner + (ip[0] & 15) * 4 + UDP_BYTES : 0;
	return ip[0] >> 4 == 6 && ip[6] == PROTO_UDP ? offsets->inner + IPV6_BYTES + UDP_BYTES : 0;
}

/* Whether a packet is a report. Its fingerprint has been made, which sets offsets->inner. */
static __always_inline bool is_report(struct __sk_buff *skb, const struct flow_key *key,
				      const struct packet_offsets *offsets)
{
	__u8 report[V05_DROP_BYTES] __attribute__((aligned(8)));
	__u32 at, bytes;

	if (likely(key->protocol != PROTO_UDP && !offsets->inner))
		return false;
	at = udp_payload(skb, key, offsets);
	if (!at || bpf_skb_load_bytes(skb, at, report, sizeof(report)) < 0)
		return false;
	bytes = v05_header_bytes(report);
	return bytes && may_end_header(skb, at + bytes);
}
