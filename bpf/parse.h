/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * From bytes to a tuple: Ethernet, up to two VLAN tags, IPv4 with options, IPv6 with up to six extension headers, ports
 * or ICMP type and code. Pure: reads between two pointers and nothing else, so the tests compile it with gcc. Tunnels
 * are not decoded. Headers are read in words whatever their alignment: the machines that bcc runs on can do that, and
 * copying byte by byte costs an IPv6 packet 10 ns.
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
#define PROTO_IPV4 4
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_IPV6 41
#define PROTO_ROUTING 43
#define PROTO_FRAGMENT 44
#define PROTO_AUTH 51
#define PROTO_ICMPV6 58
#define PROTO_DEST_OPTIONS 60
#define PROTO_SCTP 132
#define PROTO_MOBILITY 135

/* Where the headers were found, in bytes from the start of the frame. */
struct packet_offsets {
	__u16 network;
	__u16 payload;   /* what follows the IP headers, whatever it is */
	__u16 fragment;  /* IPv6 fragment header; 0: none */
	__u16 transport; /* ports, or ICMP type and code; 0: none */
	__u16 inner;	 /* IP header inside a tunnel, see fingerprint.h; 0: none */
};

/* The part of a tuple that is not an address; written in one store. */
struct tuple_rest {
	__u16 source_port;
	__u16 destination_port;
	__u8 protocol;
	__u8 family;
	__u8 no_ports;
};

static __always_inline __u32 read_be16(const __u8 *bytes)
{
	return __builtin_bswap16(*(const __be16 *)bytes);
}

static __always_inline int is_extension_header(__u8 protocol)
{
	return protocol == PROTO_HOP_BY_HOP || protocol == PROTO_ROUTING || protocol == PROTO_FRAGMENT ||
	       protocol == PROTO_AUTH || protocol == PROTO_DEST_OPTIONS || protocol == PROTO_MOBILITY;
}

/*
 * A tuple is compared and copied in words of 64 bits right after it was written, so it is written in such words: a load
 * that spans several younger stores waits until they have left the store buffer.
 */
static __always_inline void write_rest(struct flow_key *key, const struct tuple_rest *rest)
{
	*(__u64 *)&key->source_port = (__u64)rest->source_port | ((__u64)rest->destination_port << 16) |
				      ((__u64)rest->protocol << 32) | ((__u64)rest->family << 40) |
				      ((__u64)rest->no_ports << 48);
}

static __always_inline void write_addresses4(struct flow_key *key, const __u8 *ip)
{
	__u64 *source = (__u64 *)key->source, *destination = (__u64 *)key->destination;

	source[0] = *(const __be32 *)(ip + 12);
	source[1] = 0;
	destination[0] = *(const __be32 *)(ip + 16);
	destination[1] = 0;
}

static __always_inline void write_addresses6(struct flow_key *key, const __u8 *ip)
{
	__u64 *source = (__u64 *)key->source, *destination = (__u64 *)key->destination;

	source[0] = *(const __u64 *)(ip + 8);
	source[1] = *(const __u64 *)(ip + 16);
	destination[0] = *(const __u64 *)(ip + 24);
	destination[1] = *(const __u64 *)(ip + 32);
}

/* IPv4 header at data + offset. Returns the offset of what follows, or a negative error. */
static __always_inline int parse_ipv4(const __u8 *data, const __u8 *end, __u32 offset, struct flow_key *key,
				      struct tuple_rest *rest)
{
	const __u8 *ip = data + offset;
	__u32 header_bytes;

	if (ip + IPV4_MIN_BYTES > end)
		return PARSE_TRUNCATED;
	header_bytes = (ip[0] & 15) * 4;
	if (ip[0] >> 4 != 4 || header_bytes < IPV4_MIN_BYTES)
		return PARSE_TRUNCATED;
	write_addresses4(key, ip);
	rest->family = 4;
	rest->protocol = ip[9];
	rest->no_ports = (read_be16(ip + 6) & 0x1fff) != 0;
	return offset + header_bytes;
}

/* IPv6 header and its extension headers at data + offset. Returns the offset of what follows, or a negative error. */
static __always_inline int parse_ipv6(const __u8 *data, const __u8 *end, __u32 offset, struct flow_key *key,
				      struct tuple_rest *rest, __u16 *fragment)
{
	const __u8 *ip = data + offset;
	__u8 protocol;

	if (ip + IPV6_BYTES > end || ip[0] >> 4 != 6)
		return PARSE_TRUNCATED;
	write_addresses6(key, ip);
	rest->family = 6;
	rest->no_ports = 0;
	protocol = ip[6];
	offset += IPV6_BYTES;
#pragma unroll
	for (int i = 0; i < MAX_EXTENSION_HEADERS; i++) {
		const __u8 *header = data + offset;
		__u8 following;

		if (!is_extension_header(protocol))
			break;
		if (offset > MAX_HEADER_OFFSET || header + 8 > end) {
			rest->no_ports = 1;
			break;
		}
		following = header[0];
		if (protocol == PROTO_FRAGMENT) {
			*fragment = (__u16)offset;
			offset += 8;
			if (read_be16(header + 2) & 0xfff8)
				rest->no_ports = 1;
		} else if (protocol == PROTO_AUTH) {
			offset += (header[1] + 2) * 4;
		} else {
			offset += (header[1] + 1) * 8;
		}
		protocol = following;
		if (rest->no_ports)
			break; /* a later fragment: what follows is payload */
	}
	if (is_extension_header(protocol))
		rest->no_ports = 1;
	rest->protocol = protocol;
	return offset;
}

/*
 * Ports, or ICMP type and code, at data + offset; without them the packet only matches rules without ports. Returns the
 * offset, or 0 if there are none.
 */
static __always_inline __u32 parse_transport(const __u8 *data, const __u8 *end, __u32 offset, struct tuple_rest *rest)
{
	const __u8 *transport = data + offset;
	__u8 protocol = rest->protocol;

	if (offset > MAX_HEADER_OFFSET || rest->no_ports)
		return 0;
	if (protocol == PROTO_TCP || protocol == PROTO_UDP || protocol == PROTO_SCTP) {
		if (transport + 8 > end)
			return 0;
		rest->source_port = read_be16(transport);
		rest->destination_port = read_be16(transport + 2);
		return offset;
	}
	if (protocol == PROTO_ICMP || protocol == PROTO_ICMPV6) {
		if (transport + 2 > end)
			return 0;
		rest->destination_port = read_be16(transport);
		return offset;
	}
	return 0;
}

/* An IP packet at data + network, of an Ethernet type. Fills key and offsets; 0, PARSE_NOT_IP or PARSE_TRUNCATED. */
static __always_inline int parse_network(const __u8 *data, const __u8 *end, __u32 network, __u32 type,
					 struct flow_key *key, struct packet_offsets *offsets)
{
	struct tuple_rest rest = {};
	__u16 fragment = 0;
	__u32 transport;
	int next;

	if (type == ETHERTYPE_IPV4)
		next = parse_ipv4(data, end, network, key, &rest);
	else if (type == ETHERTYPE_IPV6)
		next = parse_ipv6(data, end, network, key, &rest, &fragment);
	else
		return PARSE_NOT_IP;
	if (next < 0)
		return next;
	transport = parse_transport(data, end, (__u32)next, &rest);
	if (!transport)
		rest.no_ports = 1;
	write_rest(key, &rest);
	offsets->network = (__u16)network;
	offsets->payload = (__u16)next;
	offsets->fragment = fragment;
	offsets->transport = (__u16)transport;
	offsets->inner = 0;
	return 0;
}

/* A frame from data to end. Fills key and offsets; 0, PARSE_NOT_IP or PARSE_TRUNCATED. */
static __always_inline int parse_frame(const __u8 *data, const __u8 *end, struct flow_key *key,
				       struct packet_offsets *offsets)
{
	__u32 network = ETHERNET_HEADER_BYTES, type;

	if (data + ETHERNET_HEADER_BYTES > end)
		return PARSE_TRUNCATED;
	type = read_be16(data + 12);
	if (type == ETHERTYPE_VLAN || type == ETHERTYPE_QINQ) {
		if (data + ETHERNET_HEADER_BYTES + VLAN_TAG_BYTES > end)
			return PARSE_TRUNCATED;
		type = read_be16(data + 16);
		network += VLAN_TAG_BYTES;
		if (type == ETHERTYPE_VLAN) {
			if (data + ETHERNET_HEADER_BYTES + 2 * VLAN_TAG_BYTES > end)
				return PARSE_TRUNCATED;
			type = read_be16(data + 20);
			network += VLAN_TAG_BYTES;
		}
	}
	return parse_network(data, end, network, type, key, offsets);
}
