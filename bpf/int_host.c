// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * The datapath: two TC programs and a tracepoint program. An observer: every exit of the TC programs is TC_ACT_UNSPEC,
 * no byte of a packet is written, and of its metadata only tc_index (the validation tag).
 *
 *   ingress   parse, classify, leave a watched packet's arrival in its slot
 *   egress    find the slot, measure, decide, write a report
 *   drop      a watched packet that dies becomes a drop report
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
#include "types.h"
#include "maps.h"
#include "counters.h"
#include "parse.h"
#include "classify.h"
#include "flow.h"
#include "local.h"
#include "policy.h"
#include "report.h"
#include "slot.h"
#include "drop.h"

#define CURRENT_NETNS (-1)

/* One watched packet on its way to a report. */
struct observation {
	const struct flow_key *key; /* the tuple that matched */
	__u64 ingress_ns;
	__u64 egress_ns; /* 0: now; reading the clock costs more than all else here, so only who needs it does */
	__u32 ingress_ifindex; /* 0: the host sent it */
	__u32 egress_ifindex;  /* 0: the host takes it */
	bool translated;       /* the packet no longer carries key */
};

static __always_inline int parse_packet(struct __sk_buff *skb, const struct config *config, struct scratch *scratch)
{
	return parse_frame((const __u8 *)(long)skb->data, (const __u8 *)(long)skb->data_end, &config->tunnels,
			   &scratch->key, &scratch->offsets);
}

/* Write a flow or queue report, or count why not. Returns true when it was written. */
static __always_inline bool write_report(struct __sk_buff *skb, const struct config *config, __u32 side,
					 const struct policy *policy, const struct observation *seen,
					 const struct packet_offsets *offsets, __u64 egress_ns, __u32 flags,
					 struct watchlist_counters *counters)
{
	const struct collector *collector = collector_of(side, policy->collector);
	struct record record = {};
	enum reserve_result result;
	__u32 bytes;

	if (!collector)
		return false;
	if (unlikely(config->hold)) {
		counters->suppressed++;
		return false;
	}
	result = reserve_record(RING_FLOW, policy->collector, collector, egress_ns, &record);
	if (result == RESERVE_RATE_LIMITED) {
		counters->rate_limited++;
		return false;
	}
	if (result == RESERVE_RING_FULL) {
		counters->ring_full++;
		return false;
	}
	put_v05_local(&record, config, flags, seen->ingress_ns, egress_ns,
		      attached_port_id(config, seen->ingress_ifindex), attached_port_id(config, seen->egress_ifindex));
	bytes = put_snapshot(skb, record.bytes + V05_LOCAL_BYTES, collector->snap_length);
	if (seen->translated)
		restore_tuple(record.bytes + V05_LOCAL_BYTES, bytes, seen->key, offsets);
	commit_record(&record, V05_LOCAL_BYTES + bytes);
	counters->reported++;
	return true;
}

/* Decide on a watched packet that was forwarded, sent or delivered; every path counts exactly one outcome. */
static __always_inline void observe(struct __sk_buff *skb, const struct config *config, __u32 side, __u16 watchlist,
				    const struct observation *seen, const struct packet_offsets *offsets)
{
	struct watchlist_counters *counters = counters_of(COUNTERS_TC, watchlist);
	const struct policy *policy = policy_of(side, watchlist);
	__u64 hash = flow_hash(seen->key), now = seen->egress_ns, latency_ns;
	struct flow_state state;
	struct flow *flow;
	__u32 due;
	bool known, congested;

	if (!counters || !policy)
		return;
	if (unlikely(!(policy->events & (EVENT_FLOW | EVENT_QUEUE)))) {
		counters->not_asked++;
		return;
	}
	if (unlikely(!is_sampled(hash, policy->sample))) {
		counters->sampled_out++;
		return;
	}
	flow = find_flow(hash, &known);
	if (!flow)
		return;
	if (!now && !needs_latency(policy) && is_nothing_new(flow, known, policy, seen->ingress_ns, seen->egress_ifindex)) {
		counters->suppressed++;
		return;
	}
	if (!now)
		now = bpf_ktime_get_ns();
	latency_ns = now - seen->ingress_ns;
	congested = policy->congestion_latency_ns && latency_ns >= policy->congestion_latency_ns;
	state = flow_state_of(latency_ns, seen->egress_ifindex, congested);
	due = due_events(flow, known, policy, now, state);
	if (likely(!due)) {
		counters->suppressed++;
		return;
	}
	if (write_report(skb, config, side, policy, seen, offsets, now,
			 ((due & EVENT_FLOW) ? V05_F : 0) | (congested ? V05_Q : 0), counters))
		remember_flow(flow, known, hash, now, state, COUNT_FLOW_EVICTED);
}

/* True if a socket of this namespace takes the packet: the address is ours and, for TCP and UDP, a socket is there. */
static __always_inline bool is_delivered_here(struct __sk_buff *skb, const struct flow_key *key)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sock = NULL;
	__u32 tuple_bytes;

	if (!is_local_address(key))
		return false;
	if (key->no_ports || (key->protocol != PROTO_TCP && key->protocol != PROTO_UDP))
		return true;
	if (key->family == 4) {
		tuple.ipv4.saddr = key->source[0];
		tuple.ipv4.daddr = key->destination[0];
		tuple.ipv4.sport = bpf_htons(key->source_port);
		tuple.ipv4.dport = bpf_htons(key->destination_port);
		tuple_bytes = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, key->source, 16);
		__builtin_memcpy(tuple.ipv6.daddr, key->destination, 16);
		tuple.ipv6.sport = bpf_htons(key->source_port);
		tuple.ipv6.dport = bpf_htons(key->destination_port);
		tuple_bytes = sizeof(tuple.ipv6);
	}
	if (key->protocol == PROTO_TCP)
		sock = bpf_sk_lookup_tcp(skb, &tuple, tuple_bytes, CURRENT_NETNS, 0);
	else
		sock = bpf_sk_lookup_udp(skb, &tuple, tuple_bytes, CURRENT_NETNS, 0);
	if (!sock)
		return false;
	bpf_sk_release(sock);
	return true;
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

/* The loader compiles the TC programs and the other one at the same time, each half by a compiler of its own. */
#ifndef WITHOUT_TC
int ingress(struct __sk_buff *skb)
{
	const struct config *config = current_config();
	struct scratch *scratch = scratch_of(SCRATCH_TC);
	struct verdict verdict = {};
	__u64 address, generation, now;
	__u32 flags = 0;
	__u16 watchlist, tag;
	bool delivered;
	int parsed;

	if (unlikely(!config || !config->enabled || !scratch))
		return TC_ACT_UNSPEC;
	generation = live_generation();
	parsed = parse_packet(skb, config, scratch);
	if (likely(parsed == 0))
		flags = classify(&scratch->key, scratch, &verdict, side_of(generation), true);
	else
		count(parsed == PARSE_NOT_IP ? COUNT_NOT_IP : COUNT_TRUNCATED);
	address = packet_address(skb, scratch);
	if (!flags || verdict.action == ACTION_IGNORE) {
		release_slots(address);
		return TC_ACT_UNSPEC;
	}
	now = bpf_ktime_get_ns();
	/* 0: in no rule yet, but NAT may still make it match */
	watchlist = verdict.action == ACTION_REPORT ? verdict.watchlist : 0;
	delivered = watchlist && is_delivered_here(skb, &scratch->key);
	if (watchlist)
		count_watched(counters_of(COUNTERS_TC, watchlist), 1);
	tag = take_slot(owner_word(address, watchlist, delivered ? SLOT_DELIVERED : SLOT_PENDING), now, skb->ifindex,
			generation, &scratch->key);
	if (likely(tag))
		skb->tc_index = tag;
	else if (!delivered)
		count_unfollowed(watchlist);
	if (unlikely(delivered)) {
		struct observation seen = {
			.key = &scratch->key,
			.ingress_ns = now,
			.egress_ns = now,
			.ingress_ifindex = skb->ifindex,
		};

		observe(skb, config, side_of(generation), watchlist, &seen, &scratch->offsets);
	}
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

	if (likely(leaving->owner && parsed && slot->generation == (__u16)leaving->generation &&
		   is_same_tuple(&scratch->key, &slot->key))) {
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

/* Whether a slot that carries the packet's address is this packet's, still waiting for its outcome. */
static __always_inline bool is_departing(struct __sk_buff *skb, struct slot *slot, __u64 owner, bool parsed,
					 const struct scratch *scratch)
{
	enum proof proof = proof_of(slot, (__u16)skb->tc_index, skb->ingress_ifindex);

	/* an equal tag may be chance, one time in 16,384 */
	if (unlikely(parsed && !may_be_same_packet(&scratch->key, &slot->key)))
		proof = PROOF_NONE;
	if (unlikely(proof != PROOF_TAG) &&
	    (proof == PROOF_NONE || !(parsed && shares_a_side(&scratch->key, &slot->key)))) {
		disown_slot(slot, owner);
		return false;
	}
	return true;
}

int egress(struct __sk_buff *skb)
{
	const struct config *config = current_config();
	struct scratch *scratch = scratch_of(SCRATCH_TC);
	struct departure leaving = {};
	struct observation seen = {};
	struct slot *slot;
	__u64 address, owner;
	__u16 tag;
	bool parsed;

	if (unlikely(!config || !config->enabled || !scratch))
		return TC_ACT_UNSPEC;
	address = packet_address(skb, scratch);
	slot = find_slot(address, (__u16)skb->tc_index);
	if (!slot)
		return TC_ACT_UNSPEC;
	owner = READ_ONCE(slot->owner);
	/* no slot: either not watched at ingress, or sent by the host itself */
	if (!is_owner(owner, address)) {
		if (skb->ingress_ifindex)
			return TC_ACT_UNSPEC;
		owner = 0;
	}
	parsed = parse_packet(skb, config, scratch) == 0;
	if (likely(owner && is_departing(skb, slot, owner, parsed, scratch))) {
		if (unlikely(owner_state(owner) != SLOT_PENDING))
			return TC_ACT_UNSPEC;
		leaving.owner = owner;
	} else if (skb->ingress_ifindex || !parsed) {
		return TC_ACT_UNSPEC;
	}
	leaving.generation = live_generation();
	judge_departure(scratch, slot, parsed, &leaving);
	seen.key = leaving.translated ? &scratch->arrived : &scratch->key;
	seen.translated = leaving.translated;
	seen.egress_ifindex = skb->ifindex;
	if (likely(leaving.owner)) {
		__u64 settled = owner_word(address, leaving.watchlist, SLOT_EGRESSED);

		seen.ingress_ns = slot->arrival_ns;
		seen.ingress_ifindex = slot->ifindex;
		/* never counted, and no NAT made it match: nobody asks for its outcome */
		if (!leaving.watchlist && !owner_watchlist(leaving.owner))
			return TC_ACT_UNSPEC;
		/* from here on the outcome is ours to count, or it was another's */
		if (unlikely(!exchange_owner(slot, leaving.owner, leaving.watchlist ? settled : 0)))
			return TC_ACT_UNSPEC;
		move_count(COUNTERS_TC, owner_watchlist(leaving.owner), leaving.watchlist);
	} else if (leaving.watchlist) {
		/* sent by the host: one observation point, no latency; the slot is for drops in the egress queue */
		seen.egress_ns = seen.ingress_ns = bpf_ktime_get_ns();
		count_watched(counters_of(COUNTERS_TC, leaving.watchlist), 1);
		tag = take_slot(owner_word(address, leaving.watchlist, SLOT_EGRESSED), seen.ingress_ns, 0,
				leaving.generation, &scratch->key);
		if (tag)
			skb->tc_index = tag;
	}
	if (leaving.watchlist)
		observe(skb, config, side_of(leaving.generation), leaving.watchlist, &seen, &scratch->offsets);
	return TC_ACT_UNSPEC;
}

#endif

#ifndef WITHOUT_DROP
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
	observe_drop(address, (__u32)ctx->args[2], scratch);
	WRITE_ONCE(scratch->busy, 0);
	return 0;
}
#endif
