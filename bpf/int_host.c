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

/* What there is to say of a packet that leaves. */
struct departure {
	__u64 owner; /* of its slot as it was found; 0: it has none */
	__u64 generation;
	__u16 watchlist; /* that it is reported for; 0: none */
	bool translated; /* what matched is the tuple that it came with, in scratch->arrived */
};

/*
 * Judge a packet that leaves by the tuple that it has now; if that is in no rule, the verdict that it got on arrival
 * stands. Nothing needs to be looked up again where neither the packet nor the rules have changed since.
 */
static __always_inline void judge_departure(struct scratch *scratch, const struct slot *slot, bool parsed,
					    struct departure *leaving)
{
	__u16 watched_for = owner_watchlist(leaving->owner);
	struct verdict verdict = {};

	if (likely(leaving->owner && parsed && is_same_tuple(&scratch->key, &slot->key))) {
		leaving->watchlist = watched_for;
		return;
	}
	if (parsed && (classify(&scratch->key, scratch, &verdict, side_of(leaving->generation), true) & CLASSIFY_MATCH)) {
		leaving->watchlist = verdict.action == ACTION_REPORT ? verdict.watchlist : 0;
		return;
	}
	leaving->watchlist = watched_for;
	leaving->translated = watched_for != 0;
	if (leaving->translated)
		scratch->arrived = slot->key;
}

/* Whether a slot that carries the packet's address is this packet's; if it is another's, that one is given up. */
static __always_inline bool is_departing(struct slot *slot, __u64 owner, bool parsed, const struct scratch *scratch)
{
	if (likely(parsed && slot->fingerprint == scratch->fingerprint &&
		   (is_same_tuple(&scratch->key, &slot->key) || !is_reversed(&scratch->key, &slot->key))))
		return true;
	disown_slot(slot, owner, false);
	return false;
}

/*
 * Whether a packet whose slot says that it has left already passes one more of our hooks. A packet that the host sends
 * may be like one before it in every byte, and have its address: it leaves by the same interface.
 */
static __always_inline bool has_left(__u32 ifindex, const struct slot *slot, __u64 owner, const struct scratch *scratch)
{
	if (!is_same_tuple(&scratch->key, &slot->key))
		return false;
	return owner_state(owner) != SLOT_SENT || slot->ifindex != ifindex;
}

int egress(struct __sk_buff *skb)
{
	const struct config *config = current_config();
	struct scratch *scratch = scratch_of(SCRATCH_TC);
	struct departure leaving = {};
	struct observation seen = {};
	struct slot *slot;
	__u64 address, owner;
	__u32 ifindex, ingress_ifindex;
	bool parsed;

	if (unlikely(!config || !config->enabled || !scratch))
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
	/* no slot: either not watched at ingress, or sent by the host itself */
	if (!is_owner(owner, address)) {
		if (ingress_ifindex)
			return TC_ACT_UNSPEC;
		owner = 0;
	}
	leaving.generation = live_generation();
	parsed = parse_packet(skb, scratch, leaving.generation) == 0;
	if (likely(parsed))
		scratch->fingerprint = fingerprint_packet(skb, config, scratch);
	if (likely(owner && is_departing(slot, owner, parsed, scratch))) {
		if (likely(owner_state(owner) == SLOT_PENDING))
			leaving.owner = owner;
		else if (ingress_ifindex || has_left(ifindex, slot, owner, scratch))
			return TC_ACT_UNSPEC;
	} else if (ingress_ifindex || !parsed) {
		return TC_ACT_UNSPEC;
	}
	judge_departure(scratch, slot, parsed, &leaving);
	seen.key = leaving.translated ? &scratch->arrived : &scratch->key;
	seen.translated = leaving.translated;
	seen.egress_ifindex = ifindex;
	if (likely(leaving.owner)) {
		bool kept = parsed && (is_same_tuple(&scratch->key, &slot->key) ||
				       shares_an_address(&scratch->key, &slot->key));
		__u64 settled = owner_word(address, leaving.watchlist, kept ? SLOT_EGRESSED : SLOT_REWRITTEN);

		seen.ingress_ns = slot->arrival_ns;
		seen.ingress_ifindex = slot->ifindex;
		/* never counted, and no NAT made it match: nobody asks for its outcome */
		if (!leaving.watchlist && !owner_watchlist(leaving.owner)) {
			exchange_owner(slot, leaving.owner, 0);
			return TC_ACT_UNSPEC;
		}
		/* from here on the outcome is ours to count, or it was another's */
		if (unlikely(!exchange_owner(slot, leaving.owner, leaving.watchlist ? settled : 0)))
			return TC_ACT_UNSPEC;
		move_count(COUNTERS_TC, owner_watchlist(leaving.owner), leaving.watchlist, false);
	} else if (leaving.watchlist) {
		if (unlikely(is_sent_by_agent(skb) || is_report(skb, &scratch->key, &scratch->offsets)))
			return TC_ACT_UNSPEC;
		/* sent by the host: one observation point, no latency; the slot is for drops in the egress queue */
		seen.egress_ns = seen.ingress_ns = bpf_ktime_get_ns();
		count_watched(counters_of(COUNTERS_TC, leaving.watchlist), 1, false);
		take_slot(owner_word(address, leaving.watchlist, SLOT_SENT), seen.ingress_ns, ifindex, scratch);
	}
	if (leaving.watchlist)
		observe((struct packet_source){.context = skb}, config, side_of(leaving.generation), leaving.watchlist,
			&seen, scratch);
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
