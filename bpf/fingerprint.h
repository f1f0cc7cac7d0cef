/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The fingerprint of a packet: a 32-bit hash of fields that forwarding and NAT preserve but that differ between packets
 * of a flow. It is what ties a packet to its slot, so nothing has to be written into the packet or its metadata.
 *
 *   network    protocol; IPv4 identification and fragment offset; IPv6 flow label, of later fragments identification and
 *              offset
 *   TCP        sequence and acknowledgement numbers
 *   UDP        length and up to 16 bytes of payload, 4 at a time; where the payload is not in the linear part of the skb,
 *              the sum of the payload that follows from the checksum
 *   ICMP       sequence number and 8 bytes behind the header (which of an error are the start of the packet quoted)
 *   SCTP       verification tag; of the first chunk TSN, stream and stream sequence number
 *   others     16 bytes behind the IP headers
 *
 * A packet in a VXLAN, Geneve or IP-in-IP tunnel has the fingerprint of the packet inside, so it keeps it on its way
 * into the tunnel and out of it; where no packet can be found inside, it has its own. Lengths are those of the headers: a
 * short frame has padding when it arrives and none when it leaves. Pure, like parse.h.
 */
#pragma once
#include "parse.h"

#define FINGERPRINT_MIX_NETWORK 0x9e3779b97f4a7c15ULL
#define FINGERPRINT_MIX_WORD 0xd6e8feb86659fd93ULL
#define FINGERPRINT_MIX_LAST 0xc2b2ae3d27d4eb4fULL
/* bytes from the L4 header on that a fingerprint may depend on */
#define FINGERPRINT_TRANSPORT_BYTES 24
#define IPV4_ID_AND_FRAGMENT_OFFSET __builtin_bswap32(0xffff1fff)
#define IPV6_FLOW_LABEL __builtin_bswap32(0xfffff)
#define IPV4_FRAGMENT_OFFSET 0x1fff
#define IPV6_FRAGMENT_OFFSET 0xfff8
#define UDP_BYTES 8
#define TUNNEL_HEADER_BYTES 8 /* of VXLAN (RFC 7348), and of Geneve without options (RFC 8926) */
#define GENEVE_OPTION_WORDS 0x3f

static __always_inline __u32 finish_fingerprint(__u8 protocol, __u64 network, __u64 transport)
{
	__u64 hash = (network ^ ((__u64)protocol << 40)) * FINGERPRINT_MIX_NETWORK;

	hash = (hash ^ (hash >> 32)) + transport;
	hash = (hash ^ (hash >> 29)) * FINGERPRINT_MIX_LAST;
	return (__u32)(hash ^ (hash >> 32));
}

static __always_inline __u64 network_seed4(const __u8 *ip)
{
	return *(const __be32 *)(ip + 4) & IPV4_ID_AND_FRAGMENT_OFFSET;
}

static __always_inline __u64 network_seed6(const __u8 *ip)
{
	return *(const __be32 *)ip & IPV6_FLOW_LABEL;
}

static __always_inline bool is_later_fragment4(const __u8 *ip)
{
	return (read_be16(ip + 6) & IPV4_FRAGMENT_OFFSET) != 0;
}

static __always_inline bool is_later_fragment6(const __u8 *header)
{
	return (read_be16(header + 2) & IPV6_FRAGMENT_OFFSET) != 0;
}

/*
 * What the IPv6 fragment header of a later fragment adds to the seed. That of a first one is gone when the datagram has
 * been put together, and there is a transport header to go by.
 */
static __always_inline __u64 fragment_seed(const __u8 *header)
{
	return ((__u64) * (const __be32 *)(header + 4) << 32) |
	       ((__u64)(read_be16(header + 2) & IPV6_FRAGMENT_OFFSET) << 8);
}

/* Ones' complement sum of the words of both addresses, not folded. */
static __always_inline __u64 address_sum(const struct flow_key *key)
{
	__u64 sum = 0;

#pragma unroll
	for (int i = 0; i < 4; i++)
		sum += (__u64)key->source[i] + key->destination[i];
	return sum;
}

/* Fold a 64-bit sum of 16-bit words to the ones' complement sum of RFC 1071. */
static __always_inline __u16 fold_sum(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__u16)sum;
}

/* The same as a number below 0xffff: both are zero. */
static __always_inline __u32 fold_ones_complement(__u64 sum)
{
	__u16 folded = fold_sum(sum);

	return folded == 0xffff ? 0 : folded;
}

/*
 * The part of a UDP checksum that NAT preserves: the sum of the payload. NAT corrects the checksum by what it changes in
 * addresses and ports (RFC 1624), so their sum stays the same. 0 without a checksum, and where hardware is still to
 * compute it (CHECKSUM_PARTIAL: the field holds the sum of the pseudo header, RFC 768).
 */
static __always_inline __u64 udp_payload_sum(const struct flow_key *key, const __u8 *udp)
{
	__u32 check = *(const __u16 *)(udp + 6);
	__u64 addresses = address_sum(key);
	__u64 pseudo = addresses + *(const __u16 *)(udp + 4) + __builtin_bswap16(PROTO_UDP);

	if (!check || fold_ones_complement(pseudo) == fold_ones_complement(check))
		return 0;
	return fold_ones_complement(addresses + check + *(const __u16 *)udp + *(const __u16 *)(udp + 2));
}

/* Two words, of which the first also reaches the low bits: numbers are big endian, and what counts is at their ends. */
static __always_inline __u64 mix_words(__u64 first, __u64 second)
{
	first *= FINGERPRINT_MIX_WORD;
	return (first ^ (first >> 32)) + second;
}

static __always_inline __u64 udp_seed(const struct flow_key *key, const __u8 *udp, const __u8 *end)
{
	const __u64 *payload = (const __u64 *)(udp + UDP_BYTES);
	__u32 bytes = read_be16(udp + 4);
	__u64 seed = (__u64)bytes << 48;

	if (bytes >= UDP_BYTES + 16 && (const __u8 *)(payload + 2) <= end)
		return mix_words(payload[0], payload[1]) + seed;
	if (bytes >= UDP_BYTES + 12 && bytes < UDP_BYTES + 16 && (const __u8 *)(payload + 1) + 4 <= end)
		return mix_words(payload[0], *(const __u32 *)(payload + 1)) + seed;
	if (bytes >= UDP_BYTES + 8 && bytes < UDP_BYTES + 12 && (const __u8 *)(payload + 1) <= end)
		return mix_words(payload[0], seed);
	if (bytes >= UDP_BYTES + 4 && bytes < UDP_BYTES + 8 && udp + UDP_BYTES + 4 <= end)
		return mix_words(*(const __u32 *)payload, seed);
	return seed + udp_payload_sum(key, udp);
}

/* RFC 9260: the tag is the association's, the rest is that of a DATA chunk; other chunks have other things there. */
static __always_inline __u64 sctp_seed(const __u8 *sctp, const __u8 *end, __u32 l4_bytes)
{
	__u32 tag = *(const __be32 *)(sctp + 4);

	if (sctp + 24 <= end && l4_bytes >= 24)
		return mix_words(tag, *(const __u64 *)(sctp + 16));
	if (sctp + 20 <= end && l4_bytes >= 20)
		return mix_words(tag, *(const __be32 *)(sctp + 16));
	return mix_words(tag, 0);
}

/*
 * What the L4 header and the bytes behind it add. `l4_bytes` are those that the IP header tells; of `transport` to `end`
 * at most FINGERPRINT_TRANSPORT_BYTES are read.
 */
static __always_inline __u64 transport_seed(const struct flow_key *key, const __u8 *transport, const __u8 *end,
					    __u32 l4_bytes)
{
	__u8 protocol = key->protocol;

	if (transport + 8 > end)
		return 0;
	if (protocol == PROTO_TCP)
		return transport + 12 > end ? 0 : *(const __u64 *)(transport + 4);
	if (protocol == PROTO_UDP)
		return udp_seed(key, transport, end);
	if (protocol == PROTO_SCTP)
		return sctp_seed(transport, end, l4_bytes);
	if (protocol == PROTO_ICMP || protocol == PROTO_ICMPV6) {
		__u64 seed = *(const __be16 *)(transport + 6);

		if (transport + 16 <= end && l4_bytes >= 16)
			return mix_words(*(const __u64 *)(transport + 8), seed);
		return seed;
	}
	if (transport + 16 > end || l4_bytes < 16)
		return 0;
	return mix_words(*(const __u64 *)transport, *(const __u64 *)(transport + 8));
}

/*
 * The packet inside a tunnel, as parse.h would find it outside; 0 if there is none. Of IPv6 extension headers only a
 * fragment header is followed: with others before it the fingerprints differ.
 */
static __always_inline __u32 inner_fingerprint(const __u8 *ip, const __u8 *end)
{
	struct flow_key key = {};
	bool later_fragment = false;
	const __u8 *transport;
	__u32 bytes;
	__u64 seed;

	if (ip + IPV4_MIN_BYTES > end)
		return 0;
	if (ip[0] >> 4 == 4) {
		seed = network_seed4(ip);
		write_addresses4(&key, ip);
		key.protocol = ip[9];
		later_fragment = is_later_fragment4(ip);
		transport = ip + (ip[0] & 15) * 4;
		bytes = read_be16(ip + 2) - (ip[0] & 15) * 4;
	} else {
		if (ip + IPV6_BYTES > end || ip[0] >> 4 != 6)
			return 0;
		seed = network_seed6(ip);
		write_addresses6(&key, ip);
		key.protocol = ip[6];
		transport = ip + IPV6_BYTES;
		bytes = read_be16(ip + 4);
		if (key.protocol == PROTO_FRAGMENT && transport + 8 <= end) {
			later_fragment = is_later_fragment6(transport);
			if (later_fragment)
				seed ^= fragment_seed(transport);
			key.protocol = transport[0];
			transport += 8;
			bytes -= 8;
		}
	}
	return finish_fingerprint(key.protocol, seed,
				  later_fragment ? 0 : transport_seed(&key, transport, end, bytes));
}

/* There may be fewer than three VXLAN ports: the others are 0, to which nothing is sent, and all would compare equal. */
static __always_inline int is_tunnel_port(__u16 port, const struct tunnel_ports *tunnels)
{
	return port == tunnels->geneve || port == tunnels->vxlan[0] || port == tunnels->vxlan[1] ||
	       port == tunnels->vxlan[2];
}

/* The IP packet in the Ethernet frame inside a UDP datagram to one of our tunnels; NULL if there is none. */
static __always_inline const __u8 *inside_udp_tunnel(const __u8 *udp, const __u8 *end, __u16 port,
						     const struct tunnel_ports *tunnels)
{
	const __u8 *frame = udp + UDP_BYTES + TUNNEL_HEADER_BYTES;
	__u32 type;

	if (!is_tunnel_port(port, tunnels) || frame > end)
		return NULL;
	if (port == tunnels->geneve)
		frame += (udp[UDP_BYTES] & GENEVE_OPTION_WORDS) * 4;
	if (frame + ETHERNET_HEADER_BYTES > end)
		return NULL;
	type = read_be16(frame + 12);
	return type == ETHERTYPE_IPV4 || type == ETHERTYPE_IPV6 ? frame + ETHERNET_HEADER_BYTES : NULL;
}

/* Whether a tuple is that of a tunnel which is looked into. */
static __always_inline bool is_tunnel(const struct flow_key *key, const struct tunnel_ports *tunnels)
{
	if (key->protocol == PROTO_UDP && !key->no_ports)
		return is_tunnel_port(key->destination_port, tunnels);
	return key->protocol == PROTO_IPV4 || key->protocol == PROTO_IPV6;
}

/*
 * The fingerprint of a packet that parse_frame has parsed, from the same data and end. Sets
 * offsets->inner.
 */
static __always_inline __u32 packet_fingerprint(const __u8 *data, const __u8 *end, const struct flow_key *key,
						struct packet_offsets *offsets,
						const struct tunnel_ports *tunnels)
{
	__u32 network = offsets->network, payload = offsets->payload, fragment = offsets->fragment, bytes;
	const __u8 *ip, *transport, *inner = NULL;
	bool later_fragment = false;
	__u64 seed;

	if (network > MAX_HEADER_OFFSET || payload > MAX_HEADER_OFFSET || fragment > MAX_HEADER_OFFSET)
		return 0;
	ip = data + network;
	transport = data + payload;
	if (ip + IPV4_MIN_BYTES > end)
		return 0;
	if (key->family == 4) {
		seed = network_seed4(ip);
		later_fragment = is_later_fragment4(ip);
		bytes = read_be16(ip + 2) - (payload - network);
	} else {
		const __u8 *header = data + fragment;

		seed = network_seed6(ip);
		bytes = read_be16(ip + 4) + IPV6_BYTES - (payload - network);
		if (fragment && header + 8 <= end) {
			later_fragment = is_later_fragment6(header);
			if (later_fragment)
				seed ^= fragment_seed(header);
		}
	}
	/* what follows is payload, not a header */
	if (later_fragment)
		return finish_fingerprint(key->protocol, seed, 0);
	if (key->protocol == PROTO_UDP && transport + UDP_BYTES <= end)
		inner = inside_udp_tunnel(transport, end, key->destination_port, tunnels);
	else if (key->protocol == PROTO_IPV4 || key->protocol == PROTO_IPV6)
		inner = transport;
	if (inner) {
		__u32 fingerprint = inner_fingerprint(inner, end);

		offsets->inner = fingerprint ? (__u16)(inner - data) : 0;
		if (fingerprint)
			return fingerprint;
		/* apart from what is below, which packets without a tunnel take */
		return finish_fingerprint(key->protocol, seed,
					  key->protocol == PROTO_UDP ? udp_seed(key, transport, end) : 0);
	}
	offsets->inner = 0;
	return finish_fingerprint(key->protocol, seed, transport_seed(key, transport, end, bytes));
}
