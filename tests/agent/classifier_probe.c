// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/* Stands in for int_host.c in the classifier's tests: the verdict of a TC program is the id of the rule that matched. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
#include "types.h"
#include "maps.h"
#include "counters.h"
#include "parse.h"
#include "classify.h"

#define NOT_PARSED 0xffffffff
#define MAY_MATCH_LATER 0xfffffffe

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
	return TC_ACT_UNSPEC;
}

int drop(struct bpf_raw_tracepoint_args *ctx)
{
	return 0;
}
