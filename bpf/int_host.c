// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * The datapath. An observer: every exit of the TC programs is TC_ACT_UNSPEC, the others let every packet pass, and no
 * program writes a byte of a packet or of its metadata.
 *
 *   ingress   TC: parse, classify, leave a watched packet's arrival in its slot
 *   egress    TC: find the slot, measure, decide, write a report
 *   deliver   a socket takes the packet (cgroup_skb): the same
 *   local_in  the host itself takes it (netfilter, LOCAL_IN): the same for protocols without sockets
 *   drop      a watched packet that the kernel drops becomes a drop report (raw tracepoint kfree_skb)
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
#include "types.h"
#include "maps.h"
#include "counters.h"
#include "parse.h"
#include "fingerprint.h"
#include "classify.h"
#include "flow.h"
#include "policy.h"
#include "report.h"
#include "slot.h"
#include "skb.h"
#include "observe.h"
#include "own.h"
#include "deliver.h"
#include "drop.h"

/* The tuple and offsets go to scratch, with the generation that is about to judge the tuple. */
static __always_inline int parse_packet(struct __sk_buff *skb, struct scratch *scratch, __u64 generation)
{
	int parsed = parse_frame((const __u8 *)(long)skb->data, (const __u8 *)(long)skb->data_end, &scratch->key,
				 &scratch->offsets);

	if (likely(parsed == 0))
		set_generation(&scratch->key, generation);
	return parsed;
}

static __always_inline __u32 fingerprint_packet(struct __sk_buff *skb, const struct config *config,
						struct scratch *scratch)
{
	/* through memory: the verifier forgets which way through the parser led here, and walks what follows once */
	barrier();
	return packet_fingerprint((const __u8 *)(long)skb->data, (const __u8 *)(long)skb->data_end, &scratch->key,
				  &scratch->offsets, &config->tunnels);
}

/* A watched packet for which no slot could be had: its way through the host cannot be followed. */
static __always_inline void count_unfollowed(__u16 watchlist)
{
	struct watchlist_counters *counters;

	count(COUNT_SLOT_BUSY);
	if (!watchlist)
		return;
	counters = counters_of(COUNTERS_TC, watchlist);
	if (counters)
		counters->unverified++;
}

/* The loader compiles the TC programs and the others at the same time, each half by a compiler of its own. */
#ifndef WITHOUT_TC
int ingress(struct __sk_buff *skb)
{
	const struct config *config = current_config();
	struct scratch *scratch = scratch_of(SCRATCH_TC);
	struct verdict verdict = {};
	__u64 address, generation, now;
	__u32 flags = 0;
	enum take_result taken;
	__u16 watchlist;
	int parsed;

	if (unlikely(!config || !config->enabled || !scratch))
		return TC_ACT_UNSPEC;
	generation = live_generation();
	parsed = parse_packet(skb, scratch, generation);
	if (likely(parsed == 0))
		flags = classify(&scratch->key, scratch, &verdict, side_of(generation), true);
	else
		count(parsed == PARSE_NOT_IP ? COUNT_NOT_IP : COUNT_TRUNCATED);
	address = packet_address(skb, scratch);
	if (!flags || verdict.action == ACTION_IGNORE) {
		release_slots(address);
		return TC_ACT_UNSPEC;
	}
	scratch->fingerprint = fingerprint_packet(skb, config, scratch);
	if (unlikely(is_report(skb, &scratch->key, &scratch->offsets))) {
		release_slots(address);
		return TC_ACT_UNSPEC;
	}
	now = bpf_ktime_get_ns();
	/* 0: in no rule yet, but NAT may still make it match */
	watchlist = verdict.action == ACTION_REPORT ? verdict.watchlist : 0;
	taken = take_slot(owner_word(address, watchlist, SLOT_PENDING), now, skb->ifindex, scratch);
	if (unlikely(taken == SLOT_OF_SAME))
		return TC_ACT_UNSPEC;
	if (watchlist)
		count_watched(counters_of(COUNTERS_TC, watchlist), 1, false);
	if (unlikely(taken == SLOT_NOT_HAD))
		count_unfollowed(watchlist);
	return TC_ACT_UNSPEC;
}

/*
 * Whether a slot that carries the packet's address is this packet's; if it is another's, that one is given up. `same`: the
 * packet has the tuple that the slot has.
 */
static __always_inline bool is_departing(struct slot *slot, __u64 owner, bool same, const struct scratch *scratch)
{
	if (likely(slot->fingerprint == scratch->fingerprint && (same || !is_reversed(&scratch->key, &slot->key))))
		return true;
	disown_slot(slot, owner, false);
	return false;
}

/*
 * A packet leaves. It is judged by the tuple that it has now; if that is in no rule, the verdict that it got on arrival
 * stands. Nothing needs to be looked up again where neither the packet nor the rules have changed since.
 */
int egress(struct __sk_buff *skb)
{
	const struct config *config;
	struct scratch *scratch = scratch_of(SCRATCH_TC);
	struct observation seen = {};
	struct verdict verdict = {};
	struct slot *slot;
	__u64 address, owner, generation;
	__u32 ifindex, ingress_ifindex;
	__u16 watched_for, watchlist;
	bool came, same, matched = true;

	if (unlikely(!scratch))
		return TC_ACT_UNSPEC;
	/* once: newer LLVM would keep a pointer to a field, and the verifier forbids such pointers into the context */
	ifindex = skb->ifindex;
	ingress_ifindex = skb->ingress_ifindex;
	asm volatile("" : "+r"(ifindex), "+r"(ingress_ifindex));
	address = packet_address(skb, scratch);
	slot = find_slot(address);
	if (!slot)
		return TC_ACT_UNSPEC;
	owner = READ_ONCE(slot->owner);
	came = is_owner(owner, address) && owner_state(owner) == SLOT_PENDING;
	/* what did not come in by a hook of ours, or has left by one (a stack of devices); what the host sends did neither */
	if (!came && ingress_ifindex)
		return TC_ACT_UNSPEC;
	if (!is_owner(owner, address))
		owner = 0;
	config = current_config();
	if (unlikely(!config || !config->enabled))
		return TC_ACT_UNSPEC;
	generation = live_generation();
	if (unlikely(parse_packet(skb, scratch, generation) != 0)) {
		if (owner)
			disown_slot(slot, owner, false);
		return TC_ACT_UNSPEC;
	}
	same = owner && is_same_tuple(&scratch->key, &slot->key);
	if (likely(owner)) {
		scratch->fingerprint = fingerprint_packet(skb, config, scratch);
		if (unlikely(!is_departing(slot, owner, same, scratch))) {
			if (ingress_ifindex)
				return TC_ACT_UNSPEC;
			came = false;
		} else if (!came && same && (owner_state(owner) != SLOT_SENT || slot->ifindex != ifindex)) {
			/*
			 * It has left already, and passes one more of our hooks. By the same interface a packet that the host
			 * sends may be like one before it in every byte, and have its address.
			 */
			return TC_ACT_UNSPEC;
		}
	}
	watched_for = came ? owner_watchlist(owner) : 0;
	watchlist = watched_for;
	if (unlikely(!same || !came)) {
		matched = classify(&scratch->key, scratch, &verdict, side_of(generation), true) & CLASSIFY_MATCH;
		if (matched || !came)
			watchlist = verdict.action == ACTION_REPORT ? verdict.watchlist : 0;
	}
	seen.key = &scratch->key;
	seen.egress_ifindex = ifindex;
	if (likely(came)) {
		bool kept = same || shares_an_address(&scratch->key, &slot->key);

		if (unlikely(!matched)) {
			seen.translated = watched_for != 0;
			scratch->arrived = slot->key;
			seen.key = &scratch->arrived;
		}
		seen.ingress_ns = slot->arrival_ns;
		seen.ingress_ifindex = slot->ifindex;
		/* from here on the outcome is ours to count, or it was another's; without a watchlist nobody asks for it */
		if (unlikely(!exchange_owner(slot, owner,
					     watchlist ? owner_word(address, watchlist,
								    kept ? SLOT_EGRESSED : SLOT_REWRITTEN) :
							 0)))
			return TC_ACT_UNSPEC;
		move_count(COUNTERS_TC, watched_for, watchlist, false);
	} else if (watchlist) {
		if (!owner)
			scratch->fingerprint = fingerprint_packet(skb, config, scratch);
		if (unlikely(is_sent_by_agent(skb) || is_report(skb, &scratch->key, &scratch->offsets)))
			return TC_ACT_UNSPEC;
		/* sent by the host: one observation point, no latency; the slot is for drops in the egress queue */
		seen.egress_ns = seen.ingress_ns = bpf_ktime_get_ns();
		count_watched(counters_of(COUNTERS_TC, watchlist), 1, false);
		take_slot(owner_word(address, watchlist, SLOT_SENT), seen.ingress_ns, ifindex, scratch);
	}
	if (watchlist)
		observe((struct packet_source){.context = skb}, config, side_of(generation), watchlist, &seen, scratch);
	return TC_ACT_UNSPEC;
}

#endif

#ifndef WITHOUT_OTHERS
int deliver(struct __sk_buff *skb)
{
	struct scratch *scratch = scratch_of(SCRATCH_TC);

	if (scratch)
		observe_delivery(packet_address(skb, scratch), skb, scratch, false);
	return CGROUP_PASS;
}

int local_in(struct bpf_netfilter_args *args)
{
	struct scratch *scratch = scratch_of(SCRATCH_LOCAL);

	/* softirqs that interrupt it may come here, too */
	if (scratch && !__sync_lock_test_and_set(&scratch->busy, 1)) {
		observe_delivery(packet_address((void *)args->skb, scratch), NULL, scratch, true);
		WRITE_ONCE(scratch->busy, 0);
	}
	return NETFILTER_ACCEPT;
}

int drop(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 address = ctx->args[0];
	struct slot *first = slot_of(address, 0), *second = slot_of(address, 1);
	struct scratch *scratch;

	if (!first || !second)
		return 0;
	/* nearly every dropped packet of the machine leaves here */
	if (likely(!is_owner(READ_ONCE(first->owner), address) && !is_owner(READ_ONCE(second->owner), address)))
		return 0;
	scratch = scratch_of(SCRATCH_DROP);
	if (!scratch)
		return 0;
	/*
	 * The kernel does not let this program interrupt itself, but while an upgrade replaces it there are two, with one
	 * set of maps, of which one may interrupt the other.
	 */
	if (READ_ONCE(scratch->busy)) {
		count(COUNT_DROP_NESTED);
		return 0;
	}
	WRITE_ONCE(scratch->busy, 1);
	observe_drop(address, ctx->args[1], (__u32)ctx->args[2], scratch);
	WRITE_ONCE(scratch->busy, 0);
	return 0;
}
#endif
