// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Stands in for int_host.c in the classifier's tests. `ingress` judges the frame it is run on; `egress` judges the next
 * tuple of an array, however often it is run: a test run that repeats it judges them all in one system call.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
#include "types.h"
#include "maps.h"
#include "counters.h"
#include "parse.h"
#include "classify.h"

#define NOT_PARSED 0xffffffff
#define MAY_MATCH_LATER 0xfffffffe
#define NR_PACKETS 8192

PINNED_MMAPABLE(probe_packets, struct flow_key, NR_PACKETS);
PINNED_MMAPABLE(probe_next, __u64, 1);
PINNED_MMAPABLE(probe_results, __u64, 2 * NR_PACKETS); /* with the verdict cache, then without */

static __always_inline __u64 told(__u32 flags, const struct verdict *verdict)
{
	if (flags & CLASSIFY_MATCH)
		return verdict->rule_id | (__u64)verdict->watchlist << 32 | (__u64)verdict->action << 48;
	return flags & CLASSIFY_POSSIBLE ? MAY_MATCH_LATER : 0;
}

int ingress(struct __sk_buff *skb)
{
	struct scratch *scratch = scratch_of(SCRATCH_TC);
	struct verdict verdict = {};
	__u32 flags;

	if (!scratch)
		return NOT_PARSED;
	if (parse_frame((const __u8 *)(long)skb->data, (const __u8 *)(long)skb->data_end, &scratch->key,
			&scratch->offsets) < 0)
		return NOT_PARSED;
	flags = classify(&scratch->key, scratch, &verdict, side_of(live_generation()), true);
	if (flags & CLASSIFY_MATCH)
		return verdict.rule_id;
	return flags & CLASSIFY_POSSIBLE ? MAY_MATCH_LATER : 0;
}

int egress(struct __sk_buff *skb)
{
	struct scratch *scratch = scratch_of(SCRATCH_TC);
	struct verdict verdict = {}, again = {};
	__u32 zero = 0, side = side_of(live_generation()), index;
	__u64 *next = probe_next.lookup(&zero), *cached, *uncached;
	struct flow_key *packet;

	if (!scratch || !next)
		return TC_ACT_UNSPEC;
	index = *next & (NR_PACKETS - 1);
	*next += 1;
	packet = probe_packets.lookup(&index);
	cached = probe_results.lookup(&index);
	index += NR_PACKETS;
	uncached = probe_results.lookup(&index);
	if (!packet || !cached || !uncached)
		return TC_ACT_UNSPEC;
	scratch->key = *packet;
	*cached = told(classify(&scratch->key, scratch, &verdict, side, true), &verdict);
	*uncached = told(classify(&scratch->key, scratch, &again, side, false), &again);
	return TC_ACT_UNSPEC;
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
