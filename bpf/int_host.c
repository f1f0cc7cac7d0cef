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
#include "policy.h"
#include "report.h"
#include "slot.h"
#include "drop.h"

#define CURRENT_NETNS (-1)

/* One watched packet on its way to a report. */
struct observation {
	const struct flow_key *key; /* the tuple that matched */
	__u64 ingress_ns;
	__u64 now;
	__u32 ingress_ifindex; /* 0: the host sent it */
	__u32 egress_ifindex;  /* 0: the host takes it */
	bool translated;       /* the packet no longer carries key */
};

static __always_inline int parse_packet(struct __sk_buff *skb, struct scratch *scratch)
{
	return parse_frame((const __u8 *)(long)skb->data, (const __u8 *)(long)skb->data_end, &scratch->key,
			   &scratch->offsets);
}

/* Write a flow or queue report, or count why not. Returns true when it was written. */
static __always_inline bool write_report(struct __sk_buff *skb, const struct config *config, __u32 side,
					 const struct policy *policy, const struct observation *seen,
					 const struct packet_offsets *offsets, __u32 flags,
					 struct watchlist_counters *counters, __u16 egress_port)
{
	const struct collector *collector = collector_of(side, policy->collector);
	struct record record = {};
	enum reserve_result result;
	__u32 bytes;

	if (!collector)
		return false;
	result = reserve_record(RING_FLOW, policy->collector, collector, seen->now, &record);
	if (result == RESERVE_RATE_LIMITED) {
		counters->rate_limited++;
		return false;
	}
	if (result == RESERVE_RING_FULL) {
		counters->ring_full++;
		return false;
	}
	put_v05_local(&record, config, flags, seen->ingress_ns, seen->now,
		      port_id(seen->ingress_ifindex), egress_port);
	bytes = put_snapshot(skb, record.bytes + V05_LOCAL_BYTES, collector->snap_length);
	if (seen->translated)
		restore_tuple(record.bytes + V05_LOCAL_BYTES, bytes, seen->key, offsets);
	commit_record(&record, V05_LOCAL_BYTES + bytes);
	counters->reported++;
	return true;
}

/* Decide on a watched packet that was forwarded, sent or delivered; every path counts exactly one outcome. */
static __always_inline void observe(struct __sk_buff *skb, const struct config *config, __u32 side,
				    const struct verdict *verdict, const struct observation *seen,
				    const struct packet_offsets *offsets)
{
	struct watchlist_counters *counters = counters_of(verdict->watchlist);
	const struct policy *policy = policy_of(side, verdict->watchlist);
	__u64 hash = flow_hash(seen->key), latency = seen->now - seen->ingress_ns;
	struct flow *flow;
	__u16 egress_port;
	__u32 due, latency_ns;
	bool known, congested;

	if (!counters || !policy)
		return;
	if (!(policy->events & (EVENT_FLOW | EVENT_QUEUE))) {
		counters->not_asked++;
		return;
	}
	if (!is_sampled(hash, policy->sample)) {
		counters->sampled_out++;
		return;
	}
	flow = find_flow(hash, &known);
	if (!flow)
		return;
	latency_ns = saturate_u32(latency);
	congested = policy->congestion_latency_ns && latency >= policy->congestion_latency_ns;
	egress_port = port_id(seen->egress_ifindex);
	due = due_events(flow, known, policy, seen->now, latency_ns, egress_port, congested);
	if (!due) {
		counters->suppressed++;
		return;
	}
	if (write_report(skb, config, side, policy, seen, offsets,
			 ((due & EVENT_FLOW) ? V05_F : 0) | (congested ? V05_Q : 0), counters, egress_port))
		remember_flow(flow, known, hash, seen->now, latency_ns, egress_port, congested);
}

/* True if a socket of this namespace takes the packet: the address is ours and, for TCP and UDP, a socket is there. */
static __always_inline bool is_delivered_here(struct __sk_buff *skb, const struct flow_key *key)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sock = NULL;
	struct address address;
	__u32 tuple_bytes;

	__builtin_memcpy(&address, key->destination, sizeof(address));
	if (!local_addresses.lookup(&address))
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

int ingress(struct __sk_buff *skb)
{
	const struct config *config = current_config();
	struct scratch *scratch = scratch_of(SCRATCH_TC);
	struct verdict verdict = {};
	__u32 side = 0, flags = 0;
	struct slot *slot;
	__u64 address, now;
	int parsed;

	if (!config || !config->enabled || !scratch)
		return TC_ACT_UNSPEC;
	parsed = parse_packet(skb, scratch);
	if (parsed == 0)
		flags = classify(&scratch->key, scratch, &verdict, &side, true);
	else
		count(parsed == PARSE_NOT_IP ? COUNT_NOT_IP : COUNT_TRUNCATED);
	address = packet_address(skb, scratch);
	slot = slot_of(address);
	if (!slot)
		return TC_ACT_UNSPEC;
	if (verdict.action == ACTION_IGNORE || !(flags & (CLASSIFY_MATCH | CLASSIFY_POSSIBLE))) {
		if (slot->skb == address)
			release_slot(slot);
		return TC_ACT_UNSPEC;
	}
	now = bpf_ktime_get_ns();
	take_slot(slot, address, now, skb->ifindex, &scratch->key, SLOT_PENDING);
	skb->tc_index = slot->tag;
	if (verdict.action != ACTION_REPORT)
		return TC_ACT_UNSPEC;
	slot->watchlist = verdict.watchlist;
	count_watched(verdict.watchlist, 1);
	if (is_delivered_here(skb, &scratch->key)) {
		struct observation seen = {
			.key = &scratch->key,
			.ingress_ns = now,
			.now = now,
			.ingress_ifindex = skb->ifindex,
		};

		slot->key.pad = SLOT_DELIVERED;
		observe(skb, config, side, &verdict, &seen, &scratch->offsets);
	}
	return TC_ACT_UNSPEC;
}

/*
 * The verdict on a packet that leaves, into *verdict; returns the tuple that it is about. The tuple as it is now comes
 * first. Else the verdict that it got on arrival stands, whatever the rules are by now.
 */
static __always_inline const struct flow_key *judge_leaving(struct scratch *scratch, __u16 watched_for, bool parsed,
							    struct verdict *verdict, __u32 *side)
{
	if (parsed && (classify(&scratch->key, scratch, verdict, side, true) & CLASSIFY_MATCH))
		return &scratch->key;
	verdict->action = ACTION_NONE;
	if (!watched_for)
		return &scratch->key;
	verdict->action = ACTION_REPORT;
	verdict->watchlist = watched_for;
	*side = live_side();
	return &scratch->arrived;
}

enum claim {
	CLAIM_NONE = 0,    /* not this packet's slot */
	CLAIM_OPEN = 1,    /* this packet's, and its outcome is still open: *arrival is what it told */
	CLAIM_SETTLED = 2, /* this packet's, and it has had its outcome */
};

/* Look whether a slot is this packet's. `parsed`: scratch->key is the packet's tuple as it is now. */
static __always_inline enum claim claim_slot(struct __sk_buff *skb, struct slot *slot, __u64 address, bool parsed,
					     struct scratch *scratch, struct arrival *arrival)
{
	enum proof proof = proof_of(slot, (__u16)skb->tc_index, skb->ingress_ifindex);

	if (proof == PROOF_NONE) {
		disown_slot(slot);
		return CLAIM_NONE;
	}
	if (!recall(slot, address, scratch, arrival))
		return CLAIM_NONE;
	if (proof == PROOF_INTERFACE && !(parsed && shares_a_side(&scratch->key, &scratch->arrived))) {
		disown_slot(slot);
		arrival->watchlist = 0;
		return CLAIM_NONE;
	}
	return arrival->state == SLOT_PENDING ? CLAIM_OPEN : CLAIM_SETTLED;
}

int egress(struct __sk_buff *skb)
{
	const struct config *config = current_config();
	struct scratch *scratch = scratch_of(SCRATCH_TC);
	struct verdict verdict = {};
	struct observation seen = {};
	struct arrival arrival = {};
	struct slot *slot;
	enum claim claim = CLAIM_NONE;
	bool parsed, mine, found;
	__u64 address;
	__u32 side = 0;

	if (!config || !config->enabled || !scratch)
		return TC_ACT_UNSPEC;
	address = packet_address(skb, scratch);
	slot = slot_of(address);
	if (!slot)
		return TC_ACT_UNSPEC;
	found = slot->skb == address;
	/* no slot: either not watched at ingress, or sent by the host itself */
	if (!found && skb->ingress_ifindex)
		return TC_ACT_UNSPEC;
	parsed = parse_packet(skb, scratch) == 0;
	if (found)
		claim = claim_slot(skb, slot, address, parsed, scratch, &arrival);
	mine = claim == CLAIM_OPEN;
	if (claim == CLAIM_SETTLED || (!mine && (skb->ingress_ifindex || !parsed)))
		return TC_ACT_UNSPEC;
	seen.key = judge_leaving(scratch, arrival.watchlist, parsed, &verdict, &side);
	if (verdict.action != ACTION_REPORT) {
		if (mine) {
			move_count(arrival.watchlist, 0);
			forget_slot(slot, address);
		}
		return TC_ACT_UNSPEC;
	}
	seen.now = bpf_ktime_get_ns();
	seen.egress_ifindex = skb->ifindex;
	if (mine) {
		seen.ingress_ns = arrival.arrival_ns;
		seen.ingress_ifindex = arrival.ifindex;
		seen.translated = seen.key == &scratch->arrived;
	} else {
		/* sent by the host: one observation point, no latency; the slot is for drops in the egress queue */
		seen.ingress_ns = seen.now;
		take_slot(slot, address, seen.now, 0, &scratch->key, SLOT_EGRESSED);
		skb->tc_index = slot->tag;
	}
	settle_slot(slot, address, verdict.watchlist, SLOT_EGRESSED);
	move_count(arrival.watchlist, verdict.watchlist);
	observe(skb, config, side, &verdict, &seen, &scratch->offsets);
	return TC_ACT_UNSPEC;
}

int drop(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 address = ctx->args[0];
	struct slot *slot = slot_of(address);

	/* nearly every dropped packet of the machine leaves here */
	if (!slot || slot->skb != address)
		return 0;
	observe_drop(slot, address, (__u32)ctx->args[2]);
	return 0;
}
