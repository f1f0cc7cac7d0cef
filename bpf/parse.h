/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * From bytes to a tuple: Ethernet, up to two VLAN tags, IPv4 with options, IPv6 with up to six extension headers, ports or
 * ICMP type and code. Pure: reads between two pointers and nothing else, so gcc compiles it for the tests as well.
 * Tunnels are not decoded. Headers are read in words whatever their alignment: the machines that bcc runs on can, and a
 * copy byte by byte costs an IPv6 packet 10 ns.
 */
#pragma once
#include "types.h"

#define PARSE_NOT_IP (-1)
#define PARSE_TRUNCATED (-2)

#define ETHERNET_HEADER_BYTES 14
#define VLAN_TAG_BYTES 4
#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define ETHERTYPE_VLAN 0x8100
#define ETHERTYPE_QINQ 0x88a8
#define IPV4_MIN_BYTES 20
#define IPV6_BYTES 40
#define MAX_EXTENSION_HEADERS 6
/* no header we look for starts beyond; gives the verifier a bound */
#define MAX_HEADER_OFFSET 1600

#define PROTO_HOP_BY_HOP 0
#define PROTO_ICMP 1
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_ROUTING 43
#define PROTO_FRAGMENT 44
#define PROTO_AUTH 51
#define PROTO_ICMPV6 58
#define PROTO_DEST_OPTIONS 60
#define PROTO_SCTP 132
#define PROTO_MOBILITY 135

/* Where the headers were found, in bytes from the start of the frame; transport 0: none. */
struct packet_offsets {
	__u16 network;
	__u16 transport;
};

static __always_inline __u32 read_be16(const __u8 *bytes)
{
	return __builtin_bswap16(*(const __be16 *)bytes);
}

static __always_inline void copy_words(__be32 *to, const __u8 *from, int words)
{
#pragma unroll
	for (int i = 0; i < words; i++)
		to[i] = ((const __be32 *)from)[i];
}

static __always_inline int is_extension_header(__u8 protocol)
{
	return protocol == PROTO_HOP_BY_HOP || protocol == PROTO_ROUTING || protocol == PROTO_FRAGMENT ||
	       protocol == PROTO_AUTH || protocol == PROTO_DEST_OPTIONS || protocol == PROTO_MOBILITY;
}

/* IPv4 header at data + offset. Returns the offset of what follows, or a negative error. */
static __always_inline int parse_ipv4(const __u8 *data, const __u8 *end, __u32 offset, struct flow_key *key)
{
	const __u8 *ip = data + offset;
	__u32 header_bytes;

	if (ip + IPV4_MIN_BYTES > end)
		return PARSE_TRUNCATED;
	header_bytes = (ip[0] & 15) * 4;
	if (ip[0] >> 4 != 4 || header_bytes < IPV4_MIN_BYTES)
		return PARSE_TRUNCATED;
	key->family = 4;
	copy_words(key->source, ip + 12, 1);
	copy_words(key->destination, ip + 16, 1);
	key->source[1] = key->source[2] = key->source[3] = 0;
	key->destination[1] = key->destination[2] = key->destination[3] = 0;
	key->protocol = ip[9];
	key->no_ports = (read_be16(ip + 6) & 0x1fff) != 0;
	return offset + header_bytes;
}

/* IPv6 header and its extension headers at data + offset. Returns the offset of what follows, or a negative error. */
static __always_inline int parse_ipv6(const __u8 *data, const __u8 *end, __u32 offset, struct flow_key *key)
{
	const __u8 *ip = data + offset;
	__u8 protocol;

	if (ip + IPV6_BYTES > end || ip[0] >> 4 != 6)
		return PARSE_TRUNCATED;
	key->family = 6;
	copy_words(key->source, ip + 8, 4);
	copy_words(key->destination, ip + 24, 4);
	protocol = ip[6];
	offset += IPV6_BYTES;
#pragma unroll
	for (int i = 0; i < MAX_EXTENSION_HEADERS; i++) {
		const __u8 *header = data + offset;
		__u8 following;

		if (!is_extension_header(protocol))
			break;
		if (offset > MAX_HEADER_OFFSET || header + 8 > end) {
			key->no_ports = 1;
			break;
		}
		following = header[0];
		if (protocol == PROTO_FRAGMENT) {
			offset += 8;
			if (read_be16(header + 2) & 0xfff8)
				key->no_ports = 1;
		} else if (protocol == PROTO_AUTH) {
			offset += (header[1] + 2) * 4;
		} else {
			offset += (header[1] + 1) * 8;
		}
		protocol = following;
		if (key->no_ports)
			break; /* a later fragment: what follows is payload */
	}
	if (is_extension_header(protocol))
		key->no_ports = 1;
	key->protocol = protocol;
	return offset;
}

/* Ports, or ICMP type and code, at data + offset; without them the packet only matches rules without ports. */
static __always_inline void parse_transport(const __u8 *data, const __u8 *end, __u32 offset, struct flow_key *key,
					    struct packet_offsets *offsets)
{
	const __u8 *transport = data + offset;

	if (offset > MAX_HEADER_OFFSET || key->no_ports) {
		key->no_ports = 1;
		return;
	}
	if (key->protocol == PROTO_TCP || key->protocol == PROTO_UDP || key->protocol == PROTO_SCTP) {
		if (transport + 8 > end) {
			key->no_ports = 1;
			return;
		}
		key->source_port = read_be16(transport);
		key->destination_port = read_be16(transport + 2);
	} else if (key->protocol == PROTO_ICMP || key->protocol == PROTO_ICMPV6) {
		if (transport + 2 > end) {
			key->no_ports = 1;
			return;
		}
		key->destination_port = read_be16(transport);
	} else {
		key->no_ports = 1;
		return;
	}
	offsets->transport = (__u16)offset;
}

/* A frame from data to end. Fills key and offsets; 0, PARSE_NOT_IP or PARSE_TRUNCATED. */
static __always_inline int parse_frame(const __u8 *data, const __u8 *end, struct flow_key *key,
				       struct packet_offsets *offsets)
{
	__u32 offset = ETHERNET_HEADER_BYTES, type;
	int next;

	if (data + ETHERNET_HEADER_BYTES > end)
		return PARSE_TRUNCATED;
	type = read_be16(data + 12);
	if (type == ETHERTYPE_VLAN || type == ETHERTYPE_QINQ) {
		if (data + ETHERNET_HEADER_BYTES + VLAN_TAG_BYTES > end)
			return PARSE_TRUNCATED;
		type = read_be16(data + 16);
		offset += VLAN_TAG_BYTES;
		if (type == ETHERTYPE_VLAN) {
			if (data + ETHERNET_HEADER_BYTES + 2 * VLAN_TAG_BYTES > end)
				return PARSE_TRUNCATED;
			type = read_be16(data + 20);
			offset += VLAN_TAG_BYTES;
		}
	}
	key->source_port = key->destination_port = 0;
	key->no_ports = 0;
	key->pad = 0;
	offsets->network = (__u16)offset;
	offsets->transport = 0;
	if (type == ETHERTYPE_IPV4)
		next = parse_ipv4(data, end, offset, key);
	else if (type == ETHERTYPE_IPV6)
		next = parse_ipv6(data, end, offset, key);
	else
		return PARSE_NOT_IP;
	if (next < 0)
		return next;
	parse_transport(data, end, (__u32)next, key, offsets);
	return 0;
}
