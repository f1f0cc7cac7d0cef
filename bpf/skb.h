/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * A packet as the kernel holds it: read from the sk_buff at an address, at offsets that BTF gives (struct config). For the
 * programs that see packets elsewhere than on a TC hook.
 */
#pragma once
#include "classify.h"
#include "fingerprint.h"
#include "report.h"
#include "scratch.h"

#define MAC_HEADER_UNSET 0xffff
#define ETHERTYPE_OFFSET 12
/* behind which a snapshot's tuple is not restored: two VLAN tags fit */
#define MAX_LINK_HEADER_BYTES 30

struct kernel_skb {
	__u64 head;
	__u64 data;
	__u64 device; /* struct net_device; 0: none any more, as in a socket's queue */
	__u32 tail;
	__u16 mac_header;
	__u16 network_header;
};

#define READ_FIELD(destination, base, offset) \
	bpf_probe_read_kernel(&(destination), sizeof(destination), (void *)((base) + (offset)))

static __always_inline void read_skb(struct kernel_skb *skb, __u64 address, const struct config *config)
{
	READ_FIELD(skb->head, address, config->skb_head);
	READ_FIELD(skb->data, address, config->skb_data);
	READ_FIELD(skb->device, address, config->skb_dev);
	READ_FIELD(skb->tail, address, config->skb_tail);
	READ_FIELD(skb->mac_header, address, config->skb_mac_header);
	READ_FIELD(skb->network_header, address, config->skb_network_header);
}

/* Identity of a device's network namespace, and the device's ifindex. */
static __always_inline __u64 netns_of_device(__u64 device, const struct config *config, __u32 *ifindex)
{
	__u64 net = 0, cookie = 0;

	READ_FIELD(*ifindex, device, config->dev_ifindex);
	READ_FIELD(net, device, config->dev_net);
	READ_FIELD(cookie, net, config->net_cookie);
	return cookie;
}

static __always_inline void read_kernel_ipv4(struct kernel_headers *headers, struct flow_key *key, const __u8 *header)
{
	headers->payload = (header[0] & 15) * 4;
	headers->seed = network_seed4(header);
	headers->later_fragment = is_later_fragment4(header);
	headers->l4_bytes = read_be16(header + 2) - headers->payload;
	key->family = 4;
	key->protocol = header[9];
	write_addresses4(key, header);
}

/* As parse_ipv6; `linear` bytes from `ip` on are there to be read. */
static __always_inline void read_kernel_ipv6(struct kernel_headers *headers, struct flow_key *key, const __u8 *header,
					   __u64 ip, __s32 linear)
{
	__u32 offset = IPV6_BYTES, bytes = read_be16(header + 4);
	__u8 protocol = header[6];

	headers->seed = network_seed6(header);
	key->family = 6;
	write_addresses6(key, header);
#pragma clang loop unroll(disable)
	for (int i = 0; i < MAX_EXTENSION_HEADERS; i++) {
		__u64 word = 0;
		const __u8 *extension = (const __u8 *)&word;

		if (!is_extension_header(protocol) || headers->later_fragment || headers->unknown)
			break;
		if (offset > MAX_HEADER_OFFSET || (__s32)offset + 8 > linear) {
			headers->unknown = true;
			break;
		}
		READ_FIELD(word, ip, offset);
		if (protocol == PROTO_FRAGMENT) {
			headers->later_fragment = is_later_fragment6(extension);
			if (headers->later_fragment)
				headers->seed ^= fragment_seed(extension);
			offset += 8;
		} else if (protocol == PROTO_AUTH) {
			offset += (extension[1] + 2) * 4;
		} else {
			offset += (extension[1] + 1) * 8;
		}
		protocol = extension[0];
	}
	headers->unknown |= is_extension_header(protocol) != 0;
	headers->payload = offset;
	headers->l4_bytes = bytes + IPV6_BYTES - offset;
	key->protocol = protocol;
}

/* The bytes behind the IP headers, into scratch->transport; how many of them are in the linear part, in steps of 4. */
static __always_inline __u32 read_kernel_transport(struct scratch *scratch, __u64 transport, __s32 linear)
{
	__builtin_memset(scratch->transport, 0, sizeof(scratch->transport));
	if (linear >= FINGERPRINT_TRANSPORT_BYTES) {
		READ_FIELD(scratch->transport, transport, 0);
		return FINGERPRINT_TRANSPORT_BYTES;
	}
	if (linear < 8)
		return 0;
#pragma clang loop unroll(disable)
	for (__u32 at = 0; at < FINGERPRINT_TRANSPORT_BYTES; at += 4) {
		if ((__s32)at + 4 > linear)
			return at;
		READ_FIELD(*(__u32 *)(scratch->transport + at), transport, at);
	}
	return 0;
}

/* The ports, or ICMP type and code, of what was read. */
static __always_inline void read_kernel_ports(struct flow_key *key, const __u8 *transport, __u32 there,
					    const struct kernel_headers *headers)
{
	key->no_ports = headers->later_fragment || headers->unknown || !there;
	if (key->no_ports)
		return;
	if (key->protocol == PROTO_TCP || key->protocol == PROTO_UDP || key->protocol == PROTO_SCTP) {
		key->source_port = read_be16(transport);
		key->destination_port = read_be16(transport + 2);
	} else if (key->protocol == PROTO_ICMP || key->protocol == PROTO_ICMPV6) {
		key->destination_port = read_be16(transport);
	} else {
		key->no_ports = 1;
	}
}

/* Address of the IP packet inside, if this is a tunnel that fingerprint.h looks into; 0: there is none. */
static __always_inline __u64 inside_kernel_tunnel(const struct flow_key *key, const __u8 *transport, __u64 address,
						const struct tunnel_ports *tunnels)
{
	__u64 frame = address + UDP_BYTES + TUNNEL_HEADER_BYTES;
	__be16 type = 0;

	if (key->protocol == PROTO_IPV4 || key->protocol == PROTO_IPV6)
		return address;
	if (key->protocol != PROTO_UDP || key->no_ports || !is_tunnel_port(key->destination_port, tunnels))
		return 0;
	if (key->destination_port == tunnels->geneve)
		frame += (transport[UDP_BYTES] & GENEVE_OPTION_WORDS) * 4;
	READ_FIELD(type, frame, ETHERTYPE_OFFSET);
	return type == bpf_htons(ETHERTYPE_IPV4) || type == bpf_htons(ETHERTYPE_IPV6) ? frame + ETHERNET_HEADER_BYTES : 0;
}

/*
 * The tuple and fingerprint of a dropped or taken packet as it is now, as parse.h and fingerprint.h would find them. What
 * parse_ipv6 would not follow either leaves a fingerprint that no slot has.
 */
static __always_inline void read_tuple(struct scratch *scratch, const struct kernel_skb *skb,
				       const struct tunnel_ports *tunnels)
{
	__u64 ip = skb->head + skb->network_header;
	__s32 linear = skb->tail - skb->network_header;
	__u16 inner_offset = 0;

	__builtin_memset(&scratch->key, 0, sizeof(scratch->key));
	scratch->fingerprint = 0;
	scratch->offsets.inner = 0;
#pragma clang loop unroll(disable)
	for (int level = 0; level < 2; level++) {
		struct flow_key *key = level ? &scratch->inner : &scratch->key;
		struct kernel_headers *headers = &scratch->headers;
		__u64 inner, seed = 0;
		__u32 there;

		if (linear < IPV4_MIN_BYTES)
			return;
		__builtin_memset(key, 0, sizeof(*key));
		__builtin_memset(headers, 0, sizeof(*headers));
		READ_FIELD(scratch->header, ip, 0);
		if (scratch->header[0] >> 4 == 4)
			read_kernel_ipv4(headers, key, scratch->header);
		else if (scratch->header[0] >> 4 == 6)
			read_kernel_ipv6(headers, key, scratch->header, ip, linear);
		else
			return;
		/* as in fingerprint_packet */
		barrier();
		if (!level)
			scratch->offsets.payload = (__u16)headers->payload;
		there = read_kernel_transport(scratch, ip + headers->payload, linear - (__s32)headers->payload);
		read_kernel_ports(key, scratch->transport, there, headers);
		barrier();
		inner = level || headers->later_fragment ?
				0 :
				inside_kernel_tunnel(key, scratch->transport, ip + headers->payload, tunnels);
		/* of a tunnel, too, in case that there is no packet inside: as packet_fingerprint */
		if (!headers->later_fragment && (!inner || key->protocol == PROTO_UDP))
			seed = transport_seed(key, scratch->transport, scratch->transport + there, headers->l4_bytes);
		scratch->fingerprint = finish_fingerprint(key->protocol, headers->seed, seed);
		scratch->offsets.inner = inner_offset;
		if (!inner)
			return;
		inner_offset = (__u16)(inner - ip);
		linear -= (__s32)(inner - ip);
		ip = inner;
	}
}

static __always_inline bool has_ethernet_header(const struct kernel_skb *skb)
{
	return skb->mac_header != MAC_HEADER_UNSET && skb->mac_header != skb->network_header;
}

/* Copy the linear part from an offset to `head` on, behind `skipped` bytes; the number of bytes with these. */
static __always_inline __u32 put_skb_snapshot(const struct kernel_skb *skb, __u32 start, __u32 skipped, __u8 *to,
					      __u32 snap_length, enum datapath_counter failed)
{
	__u32 bytes;

	if (skb->tail <= start)
		return skipped;
	bytes = skb->tail - start;
	if (bytes > snap_length - skipped)
		bytes = snap_length - skipped;
	if (bytes == 0 || bytes > SNAP_BYTES)
		return skipped;
	bytes = bounded(bytes);
	if (bpf_probe_read_kernel(to + skipped, bytes, (void *)(skb->head + start)) < 0) {
		count(failed);
		return skipped;
	}
	return skipped + bytes;
}

/* As put_packet, of a packet whose tuple, offsets and scratch->translated read_tuple and judge_skb have set. */
static __always_inline __u32 put_skb_packet(const struct kernel_skb *skb, bool translated, const struct config *config,
					    struct scratch *scratch, __u8 *to, __u32 snap_length,
					    enum datapath_counter failed)
{
	const struct flow_key *key = &scratch->key;
	struct packet_offsets *offsets = &scratch->offsets;
	bool in_tunnel = offsets->inner != 0, was_in_tunnel = is_tunnel(&scratch->arrived, &config->tunnels);
	bool went_into_tunnel = translated && in_tunnel && !was_in_tunnel;
	__u32 start = skb->network_header, skipped = ETHERNET_HEADER_BYTES, bytes;

	if (translated && was_in_tunnel && !in_tunnel)
		return put_headers(to, key, snap_length);
	if (went_into_tunnel) {
		start += offsets->inner;
	} else if (has_ethernet_header(skb)) {
		start = skb->mac_header;
		skipped = 0;
	}
	put_ethernet_header(to, key);
	bytes = put_skb_snapshot(skb, start, skipped, to, snap_length, failed);
	if (!translated)
		return bytes;
	if (went_into_tunnel) {
		restore_plain_tuple(to, bytes, key, offsets);
		return bytes;
	}
	offsets->network = skipped + skb->network_header - start;
	if (offsets->network > MAX_LINK_HEADER_BYTES)
		return bytes;
	offsets->transport = offsets->network + offsets->payload;
	/* as in restore_plain_tuple */
	barrier();
	restore_tuple(to, bytes, key, offsets);
	return bytes;
}

/*
 * Whether a packet carries another tuple than it came with: NAT has changed it, or it went into a tunnel or out of one.
 * Another protocol otherwise is no translation, but headers that were not followed. Without branches, each of which would
 * double what the verifier has to walk.
 */
static __always_inline __u32 is_translated(const struct flow_key *now, const struct flow_key *arrived, __u32 by_tunnel)
{
	const __u64 *a = (const __u64 *)now, *b = (const __u64 *)arrived;
	__u64 rest = a[4] ^ b[4];
	__u64 differing = (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | rest;

	/* protocol, family and no_ports are in the upper half of the last word */
	return ((rest >> 32 == 0) | by_tunnel) & (differing != 0);
}

/*
 * Judge a packet by the tuple that it has now if that is another than it came with, and if that is in no rule, by the
 * verdict that it got on arrival. Returns the watchlist that it is reported for, 0 if for none; scratch->key is the tuple that matched then.
 * `cached` as in classify.
 */
static __always_inline __u16 judge_skb(struct scratch *scratch, const struct tunnel_ports *tunnels, __u16 watched_for,
				       __u32 side, bool cached)
{
	struct verdict verdict = {};
	__u32 by_tunnel = (scratch->offsets.inner != 0) | is_tunnel(&scratch->arrived, tunnels);

	/* as in restore_plain_tuple */
	asm volatile("" : "+r"(by_tunnel));
	scratch->translated = is_translated(&scratch->key, &scratch->arrived, by_tunnel);
	if ((scratch->translated || !watched_for) &&
	    (classify(&scratch->key, scratch, &verdict, side, cached) & CLASSIFY_MATCH)) {
		scratch->translated = 0;
		return verdict.action == ACTION_REPORT ? verdict.watchlist : 0;
	}
	scratch->key = scratch->arrived;
	return watched_for;
}

