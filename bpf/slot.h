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

static __always_inline bool is_same_packet(const struct slot *slot, __u16 tc_index, __u32 ingress_ifindex)
{
	return tc_index == slot->tag || (ingress_ifindex && ingress_ifindex == slot->ifindex);
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
	slot->skb = address;
	slot->arrival_ns = now;
	slot->ifindex = ifindex;
	slot->tag = (__u16)(now >> 5) | TAG_NEVER_ZERO;
	slot->watchlist = 0;
	slot->key = *key;
	slot->key.pad = state;
}

/* Count the packet as watched for one watchlist; it may have been counted for another before NAT. */
static __always_inline void watch_slot(struct slot *slot, __u16 watchlist)
{
	struct watchlist_counters *counters;

	if (slot->watchlist == watchlist)
		return;
	if (slot->watchlist) {
		counters = counters_of(slot->watchlist);
		if (counters)
			__sync_fetch_and_add(&counters->watched, -1);
	}
	counters = counters_of(watchlist);
	if (counters)
		__sync_fetch_and_add(&counters->watched, 1);
	slot->watchlist = watchlist;
}

/* What it became by NAT is not watched: take the count back. */
static __always_inline void unwatch_slot(struct slot *slot)
{
	struct watchlist_counters *counters;

	if (!slot->watchlist)
		return;
	counters = counters_of(slot->watchlist);
	if (counters)
		__sync_fetch_and_add(&counters->watched, -1);
	slot->watchlist = 0;
}
