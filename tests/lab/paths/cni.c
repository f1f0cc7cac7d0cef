// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * What CNIs do to packets in TC programs of their own, after ours: redirect them, put them into a tunnel and take them
 * out again (on the same packet, as Cilium does), or end the chain with TC_ACT_OK.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

#define ETHERNET_BYTES 14
#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#ifndef BPF_F_ADJ_ROOM_DECAP_L3_IPV6
#define BPF_F_ADJ_ROOM_DECAP_L3_IPV6 (1ULL << 8) /* newer than bcc's copy of the header */
#endif
#define GENEVE_PORT  6081
#define GENEVE_BYTES 8
#define TUNNEL_BYTES (20 + 8 + GENEVE_BYTES + ETHERNET_BYTES)

/* A packet to a pod on an interface. The words of the pod's address are exclusive-ored. */
struct going {
	__u32 ifindex;
	__be32 address;
};

struct way {
	__u32 ifindex; /* where it goes */
	__be32 tunnel_source;
	__be32 tunnel_destination;
	__u8 mac[6]; /* of the pod */
	__u8 pad[2];
};

PINNED_HASH(cni_ways, struct going, struct way, 64);

/* The way of a packet with its IP header at an offset, NULL if it is nobody's of ours. */
static __always_inline const struct way *way_of(struct __sk_buff *skb, __u32 network, __be16 type)
{
	struct going going = {.ifindex = skb->ifindex};
	__be32 to[4] = {};

	if (type == bpf_htons(ETHERTYPE_IPV4))
		bpf_skb_load_bytes(skb, network + 16, to, 4);
	else if (type == bpf_htons(ETHERTYPE_IPV6))
		bpf_skb_load_bytes(skb, network + 24, to, 16);
	going.address = to[0] ^ to[1] ^ to[2] ^ to[3];
	return cni_ways.lookup(&going);
}

int cni_ok(struct __sk_buff *skb)
{
	return TC_ACT_OK;
}

int cni_redirect(struct __sk_buff *skb)
{
	const struct way *way = way_of(skb, ETHERNET_BYTES, skb->protocol);

	if (!way)
		return TC_ACT_UNSPEC;
	bpf_skb_store_bytes(skb, 0, way->mac, 6, 0);
	return bpf_redirect(way->ifindex, 0);
}

int cni_redirect_neigh(struct __sk_buff *skb)
{
	/* bcc declares it without the flags */
	long (*redirect_neigh)(__u32 ifindex, void *next_hop, int bytes, __u64 flags) = (void *)152;
	const struct way *way = way_of(skb, ETHERNET_BYTES, skb->protocol);

	if (!way)
		return TC_ACT_UNSPEC;
	return redirect_neigh(way->ifindex, NULL, 0, 0);
}

int cni_redirect_peer(struct __sk_buff *skb)
{
	const struct way *way = way_of(skb, ETHERNET_BYTES, skb->protocol);

	if (!way)
		return TC_ACT_UNSPEC;
	bpf_skb_store_bytes(skb, 0, way->mac, 6, 0);
	return bpf_redirect_peer(way->ifindex, 0);
}

struct tunnel {
	__u8 version;
	__u8 tos;
	__be16 length;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 protocol;
	__u16 check;
	__be32 source;
	__be32 destination;
	__be16 sport;
	__be16 dport;
	__be16 udp_length;
	__u16 udp_check;
	__be16 geneve;
	__be16 geneve_type;
	__be32 vni;
	__u8 mac[12];
	__be16 inner_type;
};

int cni_encapsulate(struct __sk_buff *skb)
{
	long (*redirect_neigh)(__u32 ifindex, void *next_hop, int bytes, __u64 flags) = (void *)152;
	const struct way *way = way_of(skb, ETHERNET_BYTES, skb->protocol);
	struct tunnel tunnel = {};
	__be16 outer_type = bpf_htons(ETHERTYPE_IPV4), inner_type = skb->protocol;
	__u64 flags = BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | BPF_F_ADJ_ROOM_NO_CSUM_RESET |
		      BPF_F_ADJ_ROOM_ENCAP_L2(ETHERNET_BYTES);
	__u32 sum = 0;

	if (!way)
		return TC_ACT_UNSPEC;
	if (bpf_skb_adjust_room(skb, TUNNEL_BYTES, BPF_ADJ_ROOM_MAC, flags) < 0)
		return TC_ACT_SHOT;
	tunnel.version = 0x45;
	tunnel.length = bpf_htons(skb->len - ETHERNET_BYTES);
	tunnel.ttl = 64;
	tunnel.protocol = 17;
	tunnel.source = way->tunnel_source;
	tunnel.destination = way->tunnel_destination;
	tunnel.sport = bpf_htons(50000);
	tunnel.dport = bpf_htons(GENEVE_PORT);
	tunnel.udp_length = bpf_htons(skb->len - ETHERNET_BYTES - 20);
	tunnel.geneve_type = bpf_htons(0x6558);
	__builtin_memcpy(tunnel.mac, way->mac, 6);
	tunnel.mac[6] = 2;
	tunnel.inner_type = inner_type;
	sum = bpf_csum_diff(0, 0, (__be32 *)&tunnel, 20, 0);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	tunnel.check = ~sum;
	bpf_skb_store_bytes(skb, 12, &outer_type, 2, 0);
	bpf_skb_store_bytes(skb, ETHERNET_BYTES, &tunnel, TUNNEL_BYTES, 0);
	return redirect_neigh(way->ifindex, NULL, 0, 0);
}

int cni_decapsulate(struct __sk_buff *skb)
{
	const struct way *way;
	__be16 dport = 0, inner_type = 0;
	__u8 protocol = 0;
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;

	if (skb->protocol != bpf_htons(ETHERTYPE_IPV4))
		return TC_ACT_UNSPEC;
	bpf_skb_load_bytes(skb, ETHERNET_BYTES + 9, &protocol, 1);
	bpf_skb_load_bytes(skb, ETHERNET_BYTES + 22, &dport, 2);
	if (protocol != 17 || dport != bpf_htons(GENEVE_PORT))
		return TC_ACT_UNSPEC;
	bpf_skb_load_bytes(skb, ETHERNET_BYTES + TUNNEL_BYTES - 2, &inner_type, 2);
	way = way_of(skb, ETHERNET_BYTES + TUNNEL_BYTES, inner_type);
	if (!way)
		return TC_ACT_UNSPEC;
	if (inner_type == bpf_htons(ETHERTYPE_IPV6))
		flags |= BPF_F_ADJ_ROOM_DECAP_L3_IPV6;
	if (bpf_skb_adjust_room(skb, -TUNNEL_BYTES, BPF_ADJ_ROOM_MAC, flags) < 0)
		return TC_ACT_SHOT;
	bpf_skb_store_bytes(skb, 12, &inner_type, 2, 0);
	bpf_skb_store_bytes(skb, 0, way->mac, 6, 0);
	return bpf_redirect(way->ifindex, 0);
}
