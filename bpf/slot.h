/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Slots tie a packet's ingress to its egress, its delivery or its drop. The index comes from the packet's address. An
 * address alone proves nothing, since the allocator hands a freed one to the next packet at once (often the reply): the
 * fingerprint must be the same as well. Nothing is written into the packet or its metadata.
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

static __always_inline bool has_egressed(enum slot_state state)
{
	return state == SLOT_EGRESSED || state == SLOT_SENT || state == SLOT_REWRITTEN;
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

/* Change the owner word; false if another CPU was first. */
static __always_inline bool exchange_owner(struct slot *slot, __u64 seen, __u64 owner)
{
	return __sync_val_compare_and_swap(&slot->owner, seen, owner) == seen;
}

/* The slot that carries a packet's address, if either does. */
static __always_inline struct slot *find_slot(__u64 address)
{
	struct slot *slot = slot_of(address, 0);

	if (!slot || is_owner(READ_ONCE(slot->owner), address))
		return slot;
	return slot_of(address, 1);
}

/* The low bits of the classifier's generation become part of the tuple, in one store: see write_rest. */
static __always_inline void set_generation(struct flow_key *key, __u64 generation)
{
	__u64 *rest = (__u64 *)&key->source_port;

	*rest |= generation << 56;
}

/* The same tuple, judged by the same rules. */
static __always_inline bool is_same_tuple(const struct flow_key *one, const struct flow_key *other)
{
	const __u64 *a = (const __u64 *)one, *b = (const __u64 *)other;

	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4];
}

/* NAT seldom changes both addresses; who sends the same bytes to somebody else has neither in common. */
static __always_inline bool shares_an_address(const struct flow_key *one, const struct flow_key *other)
{
	const __u64 *a = (const __u64 *)one->source, *b = (const __u64 *)other->source;
	const __u64 *c = (const __u64 *)one->destination, *d = (const __u64 *)other->destination;

	return one->family == other->family &&
	       ((a[0] == b[0] && a[1] == b[1]) || (c[0] == d[0] && c[1] == d[1]));
}

/* A reply may be alike in all that a fingerprint is made of (ICMPv6 echo), and often gets the memory of the request. */
static __always_inline bool is_reversed(const struct flow_key *one, const struct flow_key *other)
{
	const __u64 *a = (const __u64 *)one->source, *b = (const __u64 *)other->destination;
	const __u64 *c = (const __u64 *)one->destination, *d = (const __u64 *)other->source;

	return a[0] == b[0] && a[1] == b[1] && c[0] == d[0] && c[1] == d[1];
}

/* Counters of one watchlist, of the program that counts: see counters.h. */
static __always_inline void count_watched(struct watchlist_counters *counters, __s64 change, bool interruptible)
{
	if (counters)
		add(&counters->watched, change, interruptible);
}

/* A packet that was counted as watched for one watchlist is judged by another (0: by none): NAT made it so. */
static __always_inline void move_count(enum counter_user user, __u16 from, __u16 to, bool interruptible)
{
	if (likely(from == to))
		return;
	if (from)
		count_watched(counters_of(user, from), -1, interruptible);
	if (to)
		count_watched(counters_of(user, to), 1, interruptible);
}

/* Counters of the watchlist that waits for the outcome of a slot's packet; NULL: none does. */
static __always_inline struct watchlist_counters *waiting_counters(enum counter_user user, __u64 owner)
{
	if (likely(owner_state(owner) != SLOT_PENDING || !owner_watchlist(owner)))
		return NULL;
	return counters_of(user, owner_watchlist(owner));
}

/* A packet whose slot goes to another ended where we could not see it. */
static __always_inline void count_unresolved(enum counter_user user, __u64 owner)
{
	struct watchlist_counters *counters = waiting_counters(user, owner);

	if (counters)
		counters->unresolved++;
}

/* The slot has our address, but what left it is another packet, which must be dead. */
static __always_inline void release_slot(struct slot *slot, __u64 seen)
{
	if (exchange_owner(slot, seen, 0))
		count_unresolved(COUNTERS_TC, seen);
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
static __always_inline void disown_slot(struct slot *slot, __u64 seen, bool interruptible)
{
	struct watchlist_counters *counters;

	if (!exchange_owner(slot, seen, 0))
		return;
	counters = waiting_counters(COUNTERS_TC, seen);
	if (counters)
		add(&counters->unverified, 1, interruptible);
}

/* Whether a slot can be had without harm to another packet. */
static __always_inline bool is_vacant(const struct slot *slot, __u64 address, __u64 now)
{
	__u64 owner = READ_ONCE(slot->owner);

	if (likely(owner_state(owner) != SLOT_PENDING && owner_state(owner) != SLOT_TAKEN))
		return true;
	/* signed: another CPU may have read a later clock, and taken the slot since */
	return is_owner(owner, address) ||
	       (owner_state(owner) == SLOT_PENDING && (__s64)(now - slot->arrival_ns) > (__s64)SLOT_PATIENCE_NS);
}

/* The slot that a packet that comes now is to take: its first, or its second, or of two that are in use the older. */
static __always_inline struct slot *choose_slot(__u64 address, __u64 now)
{
	struct slot *first = slot_of(address, 0), *second;

	if (!first || likely(is_vacant(first, address, now)))
		return first;
	second = slot_of(address, 1);
	if (!second || is_vacant(second, address, now))
		return second;
	return (__s64)(second->arrival_ns - first->arrival_ns) < 0 ? second : first;
}

enum take_result {
	SLOT_TAKEN_NEW = 0,
	SLOT_NOT_HAD = 1,   /* another CPU is taking the same slot right now: this packet goes without */
	SLOT_OF_SAME = 2,   /* this packet has it: it came by another interface of a stack before, and that arrival stands */
};

/* Whether a slot is of this very packet, which passes one more of our ingress hooks (a bond and its port, macvlan). */
static __always_inline bool came_before(const struct slot *slot, __u64 seen, __u64 owner, __u32 ifindex,
					const struct scratch *scratch)
{
	return owner_state(seen) == SLOT_PENDING && is_owner(seen, owner) && slot->ifindex != ifindex &&
	       slot->fingerprint == scratch->fingerprint && is_same_tuple(&slot->key, &scratch->key);
}

/* Take one of the packet's slots; `owner` is the word that it has from then on. */
static __always_inline enum take_result take_slot(__u64 owner, __u64 now, __u32 ifindex,
						  const struct scratch *scratch)
{
	struct slot *slot = choose_slot(owner, now);
	__u64 seen;

	if (!slot)
		return SLOT_NOT_HAD;
	seen = READ_ONCE(slot->owner);
	if (unlikely(owner_state(seen) == SLOT_TAKEN))
		return SLOT_NOT_HAD;
	if (unlikely(came_before(slot, seen, owner, ifindex, scratch)))
		return SLOT_OF_SAME;
	if (unlikely(!exchange_owner(slot, seen, owner_word(owner, 0, SLOT_TAKEN))))
		return SLOT_NOT_HAD;
	count_unresolved(COUNTERS_TC, seen);
	slot->arrival_ns = now;
	slot->ifindex = ifindex;
	slot->fingerprint = scratch->fingerprint;
	slot->key = scratch->key;
	publish(&slot->owner, owner);
	return SLOT_TAKEN_NEW;
}
