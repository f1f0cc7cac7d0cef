/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Drop reports: what the kernel says about a packet that it drops, checked against the slot of the packet's address. */
#pragma once
#include "classify.h"
#include "fingerprint.h"
#include "flow.h"
#include "policy.h"
#include "report.h"
#include "skb.h"
#include "slot.h"

#define INT_REASON_TTL 26
#define IPV4_TTL_OFFSET 8
#define IPV6_HOP_LIMIT_OFFSET 7
/* type << 8 | code */
#define ICMP_ECHO_REPLY 0
#define ICMPV6_ECHO_REPLY (129 << 8)
#define SUBSYSTEM_SHIFT 16
#define SUBSYSTEM_INDEX 256
/* spreads the drop reasons of one flow over the flow table, away from the flow itself */
#define REASON_HASH 0x9fb21c651e98df25ULL

/* What its slot told of the packet; its tuple as it came in is in scratch->arrived. */
struct arrival {
	__u64 arrival_ns;
	__u32 ifindex;
};

static __always_inline __u8 refine_reason(const struct drop_reason *reason, const struct kernel_skb *skb,
					  const struct flow_key *key)
{
	__u32 offset = key->family == 4 ? IPV4_TTL_OFFSET : IPV6_HOP_LIMIT_OFFSET;
	__u8 ttl = 0xff;

	if (!(reason->flags & DROP_CHECK_TTL))
		return reason->code;
	READ_FIELD(ttl, skb->head + skb->network_header, offset);
	return ttl <= 1 ? INT_REASON_TTL : reason->code;
}

/* Decide on a watched packet that died and write its report; every path counts exactly one outcome. */
static __always_inline void report_drop(const struct config *config, __u32 side, __u16 watchlist,
					struct watchlist_counters *counters, const struct arrival *arrival,
					struct scratch *scratch, const struct kernel_skb *skb,
					const struct drop_reason *reason, __u32 egress_ifindex)
{
	const struct flow_key *key = &scratch->key;
	const struct policy *policy = policy_of(side, watchlist);
	struct flow_state state = {};
	const struct collector *collector;
	__u8 code = refine_reason(reason, skb, key);
	__u64 hash = flow_hash(key), drop_hash, now = bpf_ktime_get_ns();
	struct record record = {};
	struct flow *flow;
	enum reserve_result result;
	__u32 bytes;
	bool known;

	if (!policy)
		return;
	collector = collector_of(side, policy->collector);
	if (!collector)
		return;
	if (!(policy->events & EVENT_DROP) || !(reason->flags & DROP_REPORT)) {
		counters->drops_not_asked++;
		return;
	}
	if (!is_sampled(hash, policy->sample)) {
		counters->drops_sampled_out++;
		return;
	}
	drop_hash = (hash ^ (code * REASON_HASH)) | 1;
	flow = find_flow(drop_hash, &known);
	if (!flow)
		return;
	if (!is_period_over(flow, known, policy, now)) {
		counters->drops_suppressed++;
		return;
	}
	if (config->hold) {
		counters->drops_suppressed++;
		return;
	}
	result = reserve_record(RING_DROP, policy->collector, collector, now, &record, false);
	if (result == RESERVE_RATE_LIMITED) {
		counters->drops_rate_limited++;
		return;
	}
	if (result == RESERVE_RING_FULL) {
		counters->drops_ring_full++;
		return;
	}
	put_v05_drop(&record, config, V05_D | ((reason->flags & DROP_QUEUE) ? V05_Q : 0), arrival->arrival_ns,
		     port_id(arrival->ifindex), port_id(egress_ifindex), code);
	bytes = put_skb_packet(skb, scratch->translated, config, scratch, record.bytes + V05_DROP_BYTES,
			       collector->snap_length, COUNT_DROP_SNAPSHOT_FAILED);
	commit_record(&record, V05_DROP_BYTES + bytes, false);
	remember_flow(flow, known, drop_hash, now, state, COUNT_DROP_EVICTED);
	counters->drops_reported++;
}

static __always_inline __u32 reason_index(__u32 reason)
{
	return (reason & 0xff) | (reason >> SUBSYSTEM_SHIFT ? SUBSYSTEM_INDEX : 0);
}

/*
 * Freed with a drop reason although the packet got where it was going: an echo reply is read as a clone, by a raw socket; of
 * a group's frame that a bridge floods, the host gets the original; and a segment that TCP takes in TIME_WAIT is freed
 * without a reason (tcp_v4_rcv), behind its IP header. What TCP really drops has a reason.
 */
static __always_inline bool is_benign_free(const struct drop_reason *reason, const struct flow_key *key,
					   const struct kernel_skb *skb)
{
	__u8 first = 0;

	if (reason->flags & DROP_NOT_ECHO_REPLY)
		return (key->protocol == PROTO_ICMP && key->destination_port == ICMP_ECHO_REPLY) ||
		       (key->protocol == PROTO_ICMPV6 && key->destination_port == ICMPV6_ECHO_REPLY);
	if ((reason->flags & DROP_NOT_ABOVE_IP) && skb->data > skb->head + skb->network_header)
		return true;
	if (!(reason->flags & DROP_NOT_GROUP) || !has_ethernet_header(skb))
		return false;
	READ_FIELD(first, skb->head + skb->mac_header, 0);
	return first & 1;
}

/* The packet has ended, but not in a way that is a drop of ours. */
static __always_inline void end_unseen(struct slot *slot, __u64 owner)
{
	if (exchange_owner(slot, owner, 0))
		count_unresolved(COUNTERS_DROP, owner);
}

/*
 * Whether another network namespace dropped the packet: one kernel has the stacks of all pods, and may have several nodes.
 * What was delivered to a socket of ours is in its queue, or on its way to it: it has no device, or something else where that
 * was (udp_set_dev_scratch). Without having been delivered a packet without a device is a fragment that was put together with
 * others and is freed with them (inet_frag_reasm_finish).
 */
static __always_inline bool was_dropped_elsewhere(const struct kernel_skb *skb, enum slot_state state,
						  const struct config *config, __u32 *ifindex)
{
	if (state == SLOT_DELIVERED)
		return false;
	return !skb->device || netns_of_device(skb->device, config, ifindex) != config->netns_cookie;
}

/* Whether a packet with the bytes of the slot's may be that one: others send the same bytes elsewhere. */
static __always_inline bool may_have_tuple(const struct flow_key *now, const struct flow_key *arrived,
					   enum slot_state state)
{
	if (state == SLOT_REWRITTEN)
		return true;
	/* NAT comes before our hook on the way out */
	return state == SLOT_SENT ? is_same_tuple(now, arrived) : shares_an_address(now, arrived);
}

/*
 * Add a call site with the name of its function to drop_functions. The kernel hides the addresses of
 * symbols from a process without CAP_SYSLOG, such as the agent, but not from bpf_snprintf.
 */
static __always_inline void add_function(struct drop_site *site)
{
	struct drop_function added = {};
	__u64 location = site->location;
	__u32 index = 0;
	const char *format = (const char *)symbol_format.lookup(&index);

	if (!format)
		return;
	if (bpf_snprintf(added.name, sizeof(added.name), format, &location, sizeof(location)) < 0)
		return;
	/* Fails if another CPU has just added the site, or if the map is full. */
	drop_functions.insert(site, &added);
}

/* Count a drop by the function that freed the packet. */
static __always_inline void count_function(__u64 location, __u32 reason)
{
	struct drop_site site = {.location = location, .reason = reason};
	struct drop_function *function = drop_functions.lookup(&site);

	if (!function) {
		add_function(&site);
		function = drop_functions.lookup(&site);
	}
	if (function)
		function->count++;
	else
		count(COUNT_DROP_FUNCTION_UNKNOWN);
}

/* A packet that has the address of a watched one was freed as dropped, at `location`. */
static __always_inline void observe_drop(__u64 address, __u64 location, __u32 kernel_reason,
					 struct scratch *scratch)
{
	const struct config *config = current_config();
	__u32 index = reason_index(kernel_reason), side = side_of(live_generation()), ifindex = 0;
	const struct drop_reason *reason = drop_reasons.lookup(&index);
	struct watchlist_counters *counters;
	__u16 watched_for, watchlist;
	__u32 fingerprint;
	enum slot_state state;
	struct slot *slot;
	__u64 owner;
	struct arrival arrival;
	struct kernel_skb skb = {};
	__u64 *total;

	if (!config || !config->enabled || !reason)
		return;
	read_skb(&skb, address, config);
	slot = find_slot(address);
	if (!slot)
		return;
	owner = READ_ONCE(slot->owner);
	if (!is_owner(owner, address)) {
		count(COUNT_STALE_DROP);
		return;
	}
	watched_for = owner_watchlist(owner);
	/* apart from the word that it is in, or the verifier learns of both at once and walks the classifier twice */
	asm volatile("" : "+r"(watched_for));
	state = scratch->state = owner_state(owner);
	arrival.arrival_ns = slot->arrival_ns;
	arrival.ifindex = state == SLOT_SENT ? 0 : slot->ifindex;
	scratch->arrived = slot->key;
	fingerprint = slot->fingerprint;
	read_tuple(scratch, &skb, &config->tunnels);
	set_generation(&scratch->key, scratch->arrived.generation);
	if (scratch->fingerprint != fingerprint || (reason->flags & DROP_OF_COPY) ||
	    !may_have_tuple(&scratch->key, &scratch->arrived, state)) {
		count(COUNT_STALE_DROP);
		return;
	}
	/* from memory again: the verifier walks what follows once, not for each state */
	barrier();
	state = READ_ONCE(scratch->state);
	if (was_dropped_elsewhere(&skb, state, config, &ifindex))
		return;
	if (is_benign_free(reason, &scratch->key, &skb)) {
		end_unseen(slot, owner);
		return;
	}
	if (has_egressed(state) && !(reason->flags & DROP_AFTER_EGRESS))
		return;
	watchlist = judge_skb(scratch, &config->tunnels, watched_for, side, false);
	if (!exchange_owner(slot, owner, 0))
		return;
	move_count(COUNTERS_DROP, watched_for, watchlist, false);
	counters = counters_of(COUNTERS_DROP, watchlist);
	total = drop_counters.lookup(&index);
	if (!watchlist || !counters || !total)
		return;
	if (state == SLOT_PENDING)
		counters->dropped++;
	else
		counters->dropped_late++;
	*total += 1;
	if (reason->flags & DROP_BY_FUNCTION)
		count_function(location, index);
	report_drop(config, side, watchlist, counters, &arrival, scratch, &skb, reason,
		    has_egressed(state) ? ifindex : 0);
}
