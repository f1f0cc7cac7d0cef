/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The flow table: which flows were reported, when, and with what. Decides whether a packet is worth a report. */
#pragma once
#include "counters.h"

/* Multipliers of the flow hash: odd, with well-mixed bits; not secret. */
#define HASH_A 0x9e3779b97f4a7c15ULL
#define HASH_B 0xc2b2ae3d27d4eb4fULL
#define HASH_C 0xd6e8feb86659fd93ULL

/* Never 0, which marks an empty way. Same on every node, so that all sample the same flows. */
static __always_inline __u64 flow_hash(const struct flow_key *key)
{
	const __u64 *source = (const __u64 *)key->source;
	const __u64 *destination = (const __u64 *)key->destination;
	__u64 hash = (source[0] ^ (source[1] * HASH_B)) * HASH_A;

	hash ^= hash >> 29;
	hash = (hash + destination[0] + (destination[1] * HASH_C)) * HASH_B;
	hash ^= hash >> 32;
	hash ^= ((__u64)key->source_port << 32) | ((__u64)key->destination_port << 16) |
		((__u64)key->family << 8) | key->protocol;
	hash *= HASH_C;
	hash ^= hash >> 32;
	return hash | 1;
}

static __always_inline bool is_sampled(__u64 hash, __u32 sample)
{
	return sample <= 1 || (__u32)(hash >> 24) % sample == 0;
}

/* The way of a flow, or with *found = false the one to take over: an empty one, else the longest unreported. */
static __always_inline struct flow *find_flow(__u64 hash, bool *found)
{
	__u32 index = (__u32)(hash >> 8) & (NR_FLOW_SETS - 1);
	struct flow_set *set = flows.lookup(&index);
	struct flow *oldest;

	*found = false;
	if (!set)
		return NULL;
	oldest = &set->way[0];
#pragma unroll
	for (int i = 0; i < FLOW_WAYS; i++) {
		struct flow *flow = &set->way[i];

		if (flow->signature == hash) {
			*found = true;
			return flow;
		}
		if (flow->reported_ns < oldest->reported_ns)
			oldest = flow;
	}
	return oldest;
}

static __always_inline __u32 saturate_u32(__u64 value)
{
	return value > 0xffffffff ? 0xffffffff : value;
}

/* What of an observation the flow table keeps. */
struct flow_state {
	__u32 latency_ns; /* saturated */
	__u32 egress;     /* see struct flow */
};

#define FLOW_CONGESTED 1U

static __always_inline struct flow_state flow_state_of(__u64 latency_ns, __u32 egress_ifindex, bool congested)
{
	struct flow_state state = {
		.latency_ns = saturate_u32(latency_ns),
		.egress = (egress_ifindex << 1) | congested,
	};

	return state;
}

static __always_inline bool is_period_over(const struct flow *flow, bool known, const struct policy *policy, __u64 now)
{
	/* signed: another CPU, or an earlier packet of this batch, may have been reported later than our now */
	return !known || !policy->interval_ns || (__s64)(now - flow->reported_ns) >= (__s64)policy->interval_ns;
}

/* Whether reports of a watchlist depend on how long each packet took. */
static __always_inline bool needs_latency(const struct policy *policy)
{
	return policy->latency_change_ns || policy->congestion_latency_ns;
}

/* For a watchlist that does not: whether a packet that came at `now` is no news. */
static __always_inline bool is_nothing_new(const struct flow *flow, bool known, const struct policy *policy, __u64 now,
					   __u32 egress_ifindex)
{
	return !is_period_over(flow, known, policy, now) && flow->egress >> 1 == egress_ifindex;
}

/* Which reports this packet is due, as enum report_event bits; 0: none. */
static __always_inline __u32 due_events(const struct flow *flow, bool known, const struct policy *policy, __u64 now,
					struct flow_state state)
{
	bool period_over = is_period_over(flow, known, policy, now);
	__u32 moved = state.latency_ns > flow->latency_ns ? state.latency_ns - flow->latency_ns :
							    flow->latency_ns - state.latency_ns;
	__u32 changed = state.egress ^ flow->egress;
	__u32 due = 0;

	if ((policy->events & EVENT_FLOW) &&
	    (period_over || (changed & ~FLOW_CONGESTED) ||
	     (policy->latency_change_ns && moved > policy->latency_change_ns)))
		due |= EVENT_FLOW;
	if ((policy->events & EVENT_QUEUE) && (state.egress & FLOW_CONGESTED) &&
	    (period_over || !(flow->egress & FLOW_CONGESTED)))
		due |= EVENT_QUEUE;
	return due;
}

static __always_inline void remember_flow(struct flow *flow, bool known, __u64 hash, __u64 now,
					  struct flow_state state, enum datapath_counter evicted)
{
	if (!known && flow->signature)
		count(evicted);
	flow->signature = hash;
	flow->reported_ns = now;
	flow->latency_ns = state.latency_ns;
	flow->egress = state.egress;
}
