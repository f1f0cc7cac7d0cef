// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Stands in for int_host.c where tables are exchanged under load. Every run judges the next of some packets and compares
 * all that the tables said, rule, report settings and collector, with what each list of rules has to say of that packet.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
#include "types.h"
#include "maps.h"
#include "counters.h"
#include "parse.h"
#include "classify.h"
#include "policy.h"

#define NR_PACKETS 4096
#define NR_LISTS 8
/* counted instead of a list's number, which begins at 1 */
#define OF_NO_LIST 0
#define NO_MATCH NR_LISTS

PINNED_MMAPABLE(flip_packets, struct flow_key, NR_PACKETS);
/* index: list * NR_PACKETS + packet; 0: the list has no rule for it */
PINNED_MMAPABLE(flip_expected, __u64, NR_LISTS * NR_PACKETS);
PINNED_PERCPU_ARRAY(flip_next, __u64, 1);
/* how often a list has said what it has to say */
PINNED_PERCPU_ARRAY(flip_seen, __u64, NR_LISTS + 1);

/* The list that has said all of this of a packet. The number of a list is in its settings and its collector. */
static __always_inline __u32 list_of(const struct verdict *verdict, __u32 side, __u32 packet)
{
	__u64 told = verdict->rule_id | (__u64)verdict->watchlist << 32 | (__u64)verdict->action << 48;
	const struct policy *policy = policy_of(side, verdict->watchlist);
	const struct collector *collector;
	__u32 list, index;
	__u64 *expected;

	if (!policy || policy->interval_ns >= NR_LISTS)
		return OF_NO_LIST;
	list = policy->interval_ns;
	index = list * NR_PACKETS + packet;
	expected = flip_expected.lookup(&index);
	if (!expected || *expected != told || policy->collector != list)
		return OF_NO_LIST;
	collector = collector_of(side, policy->collector);
	return collector && collector->reports_per_second == list ? list : OF_NO_LIST;
}

/* Whether there is a list that has no rule for a packet. */
static __always_inline bool may_be_unmatched(__u32 packet)
{
#pragma unroll
	for (__u32 list = 1; list < NR_LISTS; list++) {
		__u32 index = list * NR_PACKETS + packet;
		__u64 *expected = flip_expected.lookup(&index);

		if (expected && !*expected)
			return true;
	}
	return false;
}

static __always_inline int judge(bool cached)
{
	struct scratch *scratch = scratch_of(SCRATCH_TC);
	struct verdict verdict = {};
	__u32 zero = 0, packet, list, side = side_of(live_generation());
	__u64 *next = flip_next.lookup(&zero), *seen;
	struct flow_key *key;

	if (!scratch || !next)
		return TC_ACT_UNSPEC;
	packet = *next & (NR_PACKETS - 1);
	*next += 1;
	key = flip_packets.lookup(&packet);
	if (!key)
		return TC_ACT_UNSPEC;
	scratch->key = *key;
	if (classify(&scratch->key, scratch, &verdict, side, cached) & CLASSIFY_MATCH)
		list = list_of(&verdict, side, packet);
	else
		list = may_be_unmatched(packet) ? NO_MATCH : OF_NO_LIST;
	seen = flip_seen.lookup(&list);
	if (seen)
		*seen += 1;
	return TC_ACT_UNSPEC;
}

int ingress(struct __sk_buff *skb)
{
	return judge(true);
}

int egress(struct __sk_buff *skb)
{
	return judge(false);
}

int deliver(struct __sk_buff *skb)
{
	return 1;
}

int local_in(void *context)
{
	return 1;
}

int drop(struct bpf_raw_tracepoint_args *ctx)
{
	return 0;
}
