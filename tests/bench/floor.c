/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Stands in for int_host.c: the least that a watched packet can cost. Both programs read the clock and parse, the first
 * judges the packet; nothing is remembered, compared or counted.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
#include "types.h"
#include "maps.h"
#include "parse.h"
#include "classify.h"
#include "counters.h"

static __always_inline int parse_here(struct __sk_buff *skb, struct scratch *scratch)
{
	return parse_frame((const __u8 *)(long)skb->data, (const __u8 *)(long)skb->data_end, &scratch->key,
			   &scratch->offsets);
}

int ingress(struct __sk_buff *skb)
{
	struct scratch *scratch = scratch_of(SCRATCH_TC);
	struct verdict verdict = {};

	if (!scratch || parse_here(skb, scratch) ||
	    !classify(&scratch->key, scratch, &verdict, side_of(live_generation()), true))
		return TC_ACT_UNSPEC;
	scratch->address = bpf_ktime_get_ns();
	return TC_ACT_UNSPEC;
}

int egress(struct __sk_buff *skb)
{
	struct scratch *scratch = scratch_of(SCRATCH_TC);

	if (scratch && parse_here(skb, scratch) == 0)
		scratch->address = bpf_ktime_get_ns();
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

int drop(struct bpf_raw_tracepoint_args *context)
{
	return 0;
}
