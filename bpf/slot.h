/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Slots tie a packet's ingress to its egress or its death. The index comes from the packet's address; an address alone
 * proves nothing, since the allocator hands a freed one to the next packet at once (often the reply). What proves it is
 * the tag that ingress left in tc_index, or, where a CNI's filter overwrote that, the ingress interface.
 *
 * A slot belongs to whom its owner word names: address of the packet, state, and the watchlist that counted it. All that
 * changes hands does so by compare-and-exchange of that word, so whatever CPUs do at the same time, the outcome of a
 * packet is counted once, by the one whose exchange succeeded. Only the owner of a packet may look for its address, so a
 * word that is still the same when it is exchanged proves everything that was read from the slot before.
 */
#pragma once
#include "counters.h"
#include "scratch.h"

/* Slab objects are 256 bytes apart, so neighbours get different slots. */
#define SLOT_SHIFT 8
#define SLOT_HASH 0x9e3779b1U
/* a tag is this bit, the choice of the slot, and some bits of the arrival time */
#define TAG_NEVER_ZERO 0x8000
#define TAG_CHOICE_SHIFT 14
#define TAG_TIME 0x3fff
/* a packet that waits for longer is not waited for when another needs its slot */
#define SLOT_PATIENCE_NS 1000000000ULL

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

/*
 * The slots that a packet may have: choice 0, or, where another packet waits there, choice 1. A receive queue holds hundreds of
 * packets at once, and two of them in one slot would be no accident: the allocator hands out the same addresses again and again.
 */
static __always_inline struct slot *slot_of(__u64 address, __u32 choice)
{
	__u32 number = (__u32)(address >> SLOT_SHIFT), index;

	index = choice ? (number * SLOT_HASH) >> 16 : number ^ (number >> 16);
	index &= NR_SLOTS - 1;
	return slots.lookup(&index);
}

/* Kernel addresses differ in OWNER_ADDRESS only: 8-byte aligned, and the same in the top byte. */
static __always_inline __u64 owner_word(__u64 address, __u16 watchlist, enum slot_state state)
{
	return ((__u64)watchlist << OWNER_WATCHLIST_SHIFT) | (address & OWNER_ADDRESS) | state;
}

static __always_inline enum slot_state owner_state(__u64 owner)
{
	return owner & OWNER_STATE;
}

static __always_inline __u16 owner_watchlist(__u64 owner)
{
	return owner >> OWNER_WATCHLIST_SHIFT;
}

/* Whether a slot was left by a packet of this address: this one, or one that is dead. */
static __always_inline bool is_owner(__u64 owner, __u64 address)
{
	return ((owner ^ address) & OWNER_ADDRESS) == 0 && owner_state(owner) >= SLOT_PENDING;
}

/* What ingress leaves in tc_index: never 0, never what a classifier of tc would plausibly put there. */
static __always_inline __u16 tag_of(__u64 now, __u32 choice)
{
	return ((now >> 5) & TAG_TIME) | (choice << TAG_CHOICE_SHIFT) | TAG_NEVER_ZERO;
}


/* Change the owner word; false if another CPU was first. */
static __always_inline bool exchange_owner(struct slot *slot, __u64 seen, __u64 owner)
{
	return __sync_val_compare_and_swap(&slot->owner, seen, owner) == seen;
}

/* The slot that a packet may have left: its tag says which; without one, the slot that carries its address, if any does. */
static __always_inline struct slot *find_slot(__u64 address, __u16 tc_index)
{
	struct slot *slot;

	if (tc_index & TAG_NEVER_ZERO)
		return slot_of(address, (tc_index >> TAG_CHOICE_SHIFT) & 1);
	slot = slot_of(address, 0);
	if (!slot || is_owner(READ_ONCE(slot->owner), address))
		return slot;
	return slot_of(address, 1);
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

static __always_inline bool is_same_tuple(const struct flow_key *one, const struct flow_key *other)
{
	const __u64 *a = (const __u64 *)one, *b = (const __u64 *)other;

	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4];
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

/* Whether a packet may carry another one that nobody can look into. */
static __always_inline bool is_opaque(__u8 protocol)
{
	return protocol == PROTO_GRE || protocol == PROTO_ESP || protocol == PROTO_AUTH;
}

/*
 * False if a packet with this tuple cannot be the one that came in with the other, though its tag is the same. Where they have
 * no side in common NAT has changed both, or one is the other in a tunnel; of what cannot be looked into the tag alone speaks.
 */
static __always_inline bool may_be_same_packet(const struct flow_key *one, const struct flow_key *other)
{
	return one->print == other->print ||
	       ((is_opaque(one->protocol) || is_opaque(other->protocol)) && !shares_a_side(one, other));
}

/*
 * Counters of one watchlist, of the program that counts. Each kind of program has its own, so that none needs an atomic
 * addition: TC programs run with softirqs off, and the tracepoint program, which they may interrupt, not within itself.
 */
static __always_inline void count_watched(struct watchlist_counters *counters, __s64 change)
{
	if (counters)
		counters->watched += change;
}

/* A packet that was counted as watched for one watchlist is judged by another (0: by none): NAT made it so. */
static __always_inline void move_count(enum counter_user user, __u16 from, __u16 to)
{
	if (likely(from == to))
		return;
	if (from)
		count_watched(counters_of(user, from), -1);
	if (to)
		count_watched(counters_of(user, to), 1);
}

/* A packet whose slot goes to another ended where we could not see it. */
static __always_inline void count_unresolved(__u64 owner)
{
	struct watchlist_counters *counters;

	if (likely(owner_state(owner) != SLOT_PENDING || !owner_watchlist(owner)))
		return;
	counters = counters_of(COUNTERS_TC, owner_watchlist(owner));
	if (counters)
		counters->unresolved++;
}

/* The slot has our address, but what left it is another packet, which must be dead. */
static __always_inline void release_slot(struct slot *slot, __u64 seen)
{
	if (exchange_owner(slot, seen, 0))
		count_unresolved(seen);
}

/* A packet that is of no interest: whatever its slots say of its address is of another, which must be dead. */
static __always_inline void release_slots(__u64 address)
{
#pragma unroll
	for (__u32 choice = 0; choice < 2; choice++) {
		struct slot *slot = slot_of(address, choice);
		__u64 owner;

		if (!slot)
			return;
		owner = READ_ONCE(slot->owner);
		if (unlikely(is_owner(owner, address)))
			release_slot(slot, owner);
	}
}

/* The slot has our address and a packet waits in it, but nothing proves that it is this one: count, do not guess. */
static __always_inline void disown_slot(struct slot *slot, __u64 seen)
{
	struct watchlist_counters *counters;

	if (!exchange_owner(slot, seen, 0))
		return;
	if (owner_state(seen) != SLOT_PENDING || !owner_watchlist(seen))
		return;
	counters = counters_of(COUNTERS_TC, owner_watchlist(seen));
	if (counters)
		counters->unverified++;
}

/* Whether a slot can be had without harm to another packet. */
static __always_inline bool is_vacant(const struct slot *slot, __u64 address, __u64 now)
{
	__u64 owner = READ_ONCE(slot->owner);

	if (likely(owner_state(owner) != SLOT_PENDING && owner_state(owner) != SLOT_TAKEN))
		return true;
	return is_owner(owner, address) ||
	       (owner_state(owner) == SLOT_PENDING && now - slot->arrival_ns > SLOT_PATIENCE_NS);
}

/* Which slot a packet that comes now is to take: its first, or its second, or of two that are in use the older. */
static __always_inline __u32 choose_slot(__u64 address, __u64 now)
{
	const struct slot *first = slot_of(address, 0), *second = slot_of(address, 1);

	if (!first || !second || likely(is_vacant(first, address, now)))
		return 0;
	if (is_vacant(second, address, now))
		return 1;
	return (__s64)(second->arrival_ns - first->arrival_ns) < 0;
}

/*
 * Take one of the packet's slots and write who came in; `owner` is the word that it has from then on. Returns the tag for
 * tc_index, or 0 if another CPU is taking the same slot right now: this packet goes without.
 */
static __always_inline __u16 take_slot(__u64 owner, __u64 now, __u32 ifindex, __u16 generation,
				       const struct flow_key *key)
{
	__u32 choice = choose_slot(owner, now);
	struct slot *slot = slot_of(owner, choice);
	__u64 seen;

	if (!slot)
		return 0;
	seen = READ_ONCE(slot->owner);
	if (unlikely(owner_state(seen) == SLOT_TAKEN))
		return 0;
	if (unlikely(!exchange_owner(slot, seen, owner_word(owner, 0, SLOT_TAKEN))))
		return 0;
	count_unresolved(seen);
	slot->arrival_ns = now;
	slot->ifindex = ifindex;
	slot->tag = tag_of(now, choice);
	slot->generation = generation;
	slot->key = *key;
	publish(&slot->owner, owner);
	return tag_of(now, choice);
}
