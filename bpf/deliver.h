/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Delivery: a packet has got through routing, firewall and NAT, and a socket (or the host's own ICMP) takes it. Whether a
 * packet for a local address is delivered cannot be told before: a Service address may be local, and NAT may send it on.
 *
 * `deliver` runs where packets are received, with softirqs off, so it counts and writes reports as the TC programs do, which
 * never run within it. `local_in` may be called by a process, and they may interrupt it there: see counters.h.
 */
#pragma once
#include "observe.h"
#include "skb.h"
#include "slot.h"

#define CGROUP_PASS	 1 /* the verdict of a cgroup_skb program that lets a packet pass */
#define NETFILTER_ACCEPT 1 /* NF_ACCEPT */
#define SOCKET_RAW	 3 /* SOCK_RAW */
#define PROTO_IGMP	 2
#define PROTO_OSPF	 89
#define PROTO_VRRP	 112

/* struct bpf_nf_ctx, whose fields are pointers: here they are addresses. */
struct bpf_netfilter_args {
	__u64 state;
	__u64 skb;
};

/* Protocols whose packets no socket takes, or a copy of them only (raw sockets); tunnels are none, their packets go on. */
static __always_inline bool ends_in_host(__u8 protocol)
{
	return protocol == PROTO_ICMP || protocol == PROTO_ICMPV6 || protocol == PROTO_IGMP || protocol == PROTO_OSPF ||
	       protocol == PROTO_VRRP;
}

/*
 * The interface of ours whose other end is a pod's device; 0 if there is none. veth and netkit begin their private part
 * with a pointer to the other end (struct veth_priv, struct netkit); that it points back proves that it is one.
 */
static __always_inline __u32 interface_of_pod(__u64 device, const struct config *config)
{
	__u64 peer = 0, back = 0;
	__u32 ifindex = 0;

	READ_FIELD(peer, device, config->dev_priv);
	READ_FIELD(back, peer, config->dev_priv);
	if (back != device || netns_of_device(peer, config, &ifindex) != config->netns_cookie)
		return 0;
	return ports.lookup(&ifindex) ? ifindex : 0;
}

/*
 * Where a packet was taken: the state that its slot gets, and the interface by which it left. SLOT_PENDING: somewhere else,
 * to which it may have gone by an interface that we do not watch.
 */
static __always_inline enum slot_state place_of_delivery(const struct kernel_skb *skb, const struct config *config,
							 __u32 *egress_ifindex)
{
	__u32 ifindex;

	if (!skb->device)
		return SLOT_PENDING;
	if (netns_of_device(skb->device, config, &ifindex) == config->netns_cookie)
		return SLOT_DELIVERED;
	*egress_ifindex = interface_of_pod(skb->device, config);
	return *egress_ifindex ? SLOT_EGRESSED : SLOT_PENDING;
}

/* Raw sockets are given copies, at addresses that other packets had before. */
static __always_inline bool is_raw_socket(struct __sk_buff *context)
{
	struct bpf_sock *sock = context->sk;

	if (!sock)
		return false;
	sock = bpf_sk_fullsock(sock);
	return sock && sock->type == SOCKET_RAW;
}

/*
 * The packet with this address was taken; count and report it if it is a watched one. `interruptible` as in add(). `context`
 * is that of the program `deliver`: a socket of any network namespace takes it (sk_filter_trim_cap). NULL: it has passed the
 * last hook of our own namespace's NF_INET_LOCAL_IN.
 */
static __always_inline void observe_delivery(__u64 address, struct __sk_buff *context, struct scratch *scratch,
					     const bool interruptible)
{
	const struct config *config;
	struct observation seen = {};
	struct kernel_skb skb = {};
	struct slot *slot = find_slot(address);
	enum slot_state state;
	__u16 watched_for, watchlist;
	__u32 fingerprint, side;
	__u64 owner;

	if (!slot)
		return;
	owner = READ_ONCE(slot->owner);
	/* nearly every packet of the machine leaves here */
	if (likely(!is_owner(owner, address) || owner_state(owner) != SLOT_PENDING))
		return;
	config = current_config();
	if (!config || !config->enabled || (context && is_raw_socket(context)))
		return;
	/* NAT keeps the protocol, and only a tunnel may hide another; TCP and UDP are for `deliver` */
	if (!context && !ends_in_host(slot->key.protocol) && !is_tunnel(&slot->key, &config->tunnels))
		return;
	watched_for = owner_watchlist(owner);
	asm volatile("" : "+r"(watched_for)); /* as in observe_drop */
	seen.ingress_ns = slot->arrival_ns;
	seen.ingress_ifindex = slot->ifindex;
	fingerprint = slot->fingerprint;
	scratch->arrived = slot->key;
	read_skb(&skb, address, config);
	read_tuple(scratch, &skb, &config->tunnels);
	if (!context && !ends_in_host(scratch->key.protocol))
		return;
	if (scratch->fingerprint != fingerprint ||
	    !(shares_an_address(&scratch->key, &scratch->arrived) || is_tunnel(&scratch->arrived, &config->tunnels))) {
		disown_slot(slot, owner, interruptible);
		return;
	}
	state = place_of_delivery(&skb, config, &seen.egress_ifindex);
	if (state == SLOT_PENDING)
		return;
	set_generation(&scratch->key, scratch->arrived.generation);
	side = side_of(live_generation());
	watchlist = judge_skb(scratch, &config->tunnels, watched_for, side, !interruptible);
	if (!exchange_owner(slot, owner, watchlist ? owner_word(address, watchlist, state) : 0))
		return;
	move_count(COUNTERS_TC, watched_for, watchlist, interruptible);
	if (!watchlist)
		return;
	seen.key = &scratch->key;
	seen.translated = scratch->translated;
	observe((struct packet_source){.skb = &skb, .interruptible = interruptible}, config, side, watchlist, &seen, scratch);
}
