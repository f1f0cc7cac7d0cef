/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Slots tie a packet's ingress to its egress or its death. The index comes from the packet's address; an address alone
 * proves nothing, since the allocator hands a freed one to the next packet at once (often the reply). What proves it is
 * the tag that ingress left in tc_index, or, where a CNI's filter overwrote that, the ingress interface.
 */
#pragma once
#include "counters.h"
#include "scratch.h"

/* Slab objects are 256 bytes apart, so neighbours get different slots. */
#define SLOT_SHIFT 8
#define TAG_NEVER_ZERO 0x8000

static __always_inline const struct config *current_config(void)
{
	__u32 zero = 0;

	return config.lookup(&zero);
}

/*
 * The packet's address as a number. The verifier forbids arithmetic on the context pointer, but not on what is read
 * back from memory.
 */
static __always_inline __u64 packet_address(void *skb, struct scratch *scratch)
{
	scratch->address = (__u64)skb;
	barrier();
	return READ_ONCE(scratch->address);
}

static __always_inline struct slot *slot_of(__u64 address)
{
	__u32 index = (__u32)(address >> SLOT_SHIFT) & (NR_SLOTS - 1);

	return slots.lookup(&index);
}

enum proof {
	PROOF_NONE = 0,
	PROOF_INTERFACE = 1, /* the tag is gone, the ingress interface agrees: the tuple must agree as well */
	PROOF_TAG = 2,
};

/*
 * Whether a packet found by its address is the one that left the slot. A tag that is another one says no, whatever the
 * interface says: what the kernel makes of a packet inside the node (segments, clones) inherits both.
 */
static __always_inline enum proof proof_of(const struct slot *slot, __u16 tc_index, __u32 ingress_ifindex)
{
	if (tc_index == slot->tag)
		return PROOF_TAG;
	if (tc_index & TAG_NEVER_ZERO)
		return PROOF_NONE;
	return ingress_ifindex && ingress_ifindex == slot->ifindex ? PROOF_INTERFACE : PROOF_NONE;
}

/* NAT changes one side of a packet; one that has neither side in common is another packet. */
static __always_inline bool shares_a_side(const struct flow_key *one, const struct flow_key *other)
{
	const __u64 *a = (const __u64 *)one->source, *b = (const __u64 *)other->source;
	const __u64 *c = (const __u64 *)one->destination, *d = (const __u64 *)other->destination;

	if (one->family != other->family || one->protocol != other->protocol)
		return false;
	return (a[0] == b[0] && a[1] == b[1]) || (c[0] == d[0] && c[1] == d[1]);
}

/* What a slot told of a packet. The tuple is in scratch->arrived. */
struct arrival {
	__u64 arrival_ns;
	__u32 ifindex;
	__u16 watchlist;
	__u8 state;
};

/*
 * Read a slot that was found by its packet's address. False if another packet took the slot over meanwhile, on another
 * CPU: only the owner of a packet may look for its address, so the address still being there proves the rest.
 */
static __always_inline bool recall(const struct slot *slot, __u64 address, struct scratch *scratch,
				   struct arrival *arrival)
{
	arrival->arrival_ns = slot->arrival_ns;
	arrival->ifindex = slot->ifindex;
	arrival->watchlist = slot->watchlist;
	scratch->arrived = slot->key;
	arrival->state = scratch->arrived.pad;
	barrier();
	return READ_ONCE(slot->skb) == address;
}

static __always_inline void count_watched(__u16 watchlist, __s64 change)
{
	struct watchlist_counters *counters;

	if (!watchlist)
		return;
	counters = counters_of(watchlist);
	if (counters)
		__sync_fetch_and_add(&counters->watched, change);
}

/* A packet that was counted as watched for one watchlist is judged by another (0: by none): NAT made it so. */
static __always_inline void move_count(__u16 from, __u16 to)
{
	if (from == to)
		return;
	count_watched(from, -1);
	count_watched(to, 1);
}

/* The packet of this slot ended where we could not see it. */
static __always_inline void settle_unresolved(struct slot *slot)
{
	struct watchlist_counters *counters;

	if (!slot->watchlist || slot->key.pad != SLOT_PENDING)
		return;
	counters = counters_of(slot->watchlist);
	if (counters)
		__sync_fetch_and_add(&counters->unresolved, 1);
}

static __always_inline void release_slot(struct slot *slot)
{
	settle_unresolved(slot);
	slot->skb = 0;
	slot->watchlist = 0;
	slot->key.pad = SLOT_FREE;
}

/* The address is that of a waiting packet, but nothing proves that this is the packet: count, do not guess. */
static __always_inline void disown_slot(struct slot *slot)
{
	struct watchlist_counters *counters;

	if (slot->watchlist && slot->key.pad == SLOT_PENDING) {
		counters = counters_of(slot->watchlist);
		if (counters)
			counters->unverified++;
		slot->key.pad = SLOT_FREE;
	}
	release_slot(slot);
}

static __always_inline void take_slot(struct slot *slot, __u64 address, __u64 now, __u32 ifindex,
				      const struct flow_key *key, __u8 state)
{
	settle_unresolved(slot);
	/* the address first: who reads the rest checks the address afterwards */
	WRITE_ONCE(slot->skb, address);
	barrier();
	slot->arrival_ns = now;
	slot->ifindex = ifindex;
	slot->tag = (__u16)(now >> 5) | TAG_NEVER_ZERO;
	slot->watchlist = 0;
	slot->key = *key;
	slot->key.pad = state;
}

/* The packet has had its outcome; its slot stays for what may still happen to it, unless another has taken it. */
static __always_inline void settle_slot(struct slot *slot, __u64 address, __u16 watchlist, __u8 state)
{
	if (READ_ONCE(slot->skb) != address)
		return;
	slot->watchlist = watchlist;
	slot->key.pad = state;
}

/* The packet is of no interest any more, and its counts are settled. */
static __always_inline void forget_slot(struct slot *slot, __u64 address)
{
	if (READ_ONCE(slot->skb) != address)
		return;
	slot->key.pad = SLOT_FREE;
	slot->watchlist = 0;
	slot->skb = 0;
}
