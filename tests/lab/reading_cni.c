// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * A stand-in for a CNI that reads everything: before ours runs a program that fills what a TC program may write of a
 * packet's metadata with bits of the packet's number, behind ours one that decides by all of these bits.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

/* Ethernet, IPv4, UDP, and what tests.lab.traffic.payload begins with */
#define NUMBER_OFFSET	 (14 + 20 + 8 + PAYLOAD_TAG_BYTES)
#define HOOK_INGRESS	 0
#define HOOK_EGRESS	 1
#define LET_PASS	 1
#define SHOT		 2

PINNED_MMAPABLE(cni_decisions, __u32, 2 * NR_DECISIONS);

static __always_inline __u32 mix(__u64 value)
{
	value *= 0x9e3779b97f4a7c15ULL;
	value ^= value >> 29;
	value *= 0xbf58476d1ce4e5b9ULL;
	return value >> 32;
}

/* The packet's number, or a negative value for packets of others. */
static __always_inline int number_of(struct __sk_buff *skb, __u32 *number)
{
	__be32 be = 0;
	__u8 protocol = 0;
	__be16 port = 0;

	if (skb->protocol != bpf_htons(0x0800) || bpf_skb_load_bytes(skb, 14 + 9, &protocol, 1) < 0 || protocol != 17)
		return -1;
	if (bpf_skb_load_bytes(skb, 14 + 20 + 2, &port, 2) < 0 || port != bpf_htons(WATCHED_PORT))
		return -1;
	if (bpf_skb_load_bytes(skb, NUMBER_OFFSET, &be, 4) < 0)
		return -1;
	*number = bpf_ntohl(be);
	return *number < NR_DECISIONS ? 0 : -1;
}

static __always_inline int write_noise(struct __sk_buff *skb, __u32 hook)
{
	long (*set_tstamp)(struct __sk_buff *skb, __u64 tstamp, __u32 type) = (void *)192;
	__u32 number;

	if (number_of(skb, &number) < 0)
		return TC_ACT_UNSPEC;
	number = number * 2 + hook;
	skb->mark = mix(number + 1);
	skb->priority = mix(number + 2);
	skb->tc_index = mix(number + 3) & 0xffff;
	skb->tc_classid = mix(number + 4);
	skb->queue_mapping = mix(number + 5) & 0xfffe;
	skb->cb[0] = mix(number + 6);
	skb->cb[1] = mix(number + 7);
	skb->cb[2] = mix(number + 8);
	skb->cb[3] = mix(number + 9);
	skb->cb[4] = mix(number + 10);
	bpf_set_hash(skb, mix(number + 11));
	set_tstamp(skb, ((__u64)mix(number + 12) << 20) | 1, 1);
	return TC_ACT_UNSPEC;
}

static __always_inline int decide(struct __sk_buff *skb, __u32 hook)
{
	__u32 number, index, *decision;
	__u64 all;

	if (number_of(skb, &number) < 0)
		return TC_ACT_UNSPEC;
	index = hook * NR_DECISIONS + number;
	decision = cni_decisions.lookup(&index);
	if (!decision)
		return TC_ACT_UNSPEC;
	all = mix(number);
	all = mix(all << 32 | skb->mark);
	all = mix(all << 32 | skb->priority);
	all = mix(all << 32 | skb->tc_index);
	all = mix(all << 32 | skb->tc_classid);
	all = mix(all << 32 | skb->queue_mapping);
	all = mix(all << 32 | skb->cb[0]);
	all = mix(all << 32 | skb->cb[1]);
	all = mix(all << 32 | skb->cb[2]);
	all = mix(all << 32 | skb->cb[3]);
	all = mix(all << 32 | skb->cb[4]);
	all = mix(all << 32 | skb->hash);
	all = mix(all ^ skb->tstamp);
	/* all of it is kept, so that one bit that differs is seen; a quarter is dropped */
	*decision = (all & ~3U) | ((all >> 30) ? LET_PASS : SHOT);
	return *decision & SHOT ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

int noise_ingress(struct __sk_buff *skb)
{
	return write_noise(skb, HOOK_INGRESS);
}

int noise_egress(struct __sk_buff *skb)
{
	return write_noise(skb, HOOK_EGRESS);
}

int decide_ingress(struct __sk_buff *skb)
{
	return decide(skb, HOOK_INGRESS);
}

int decide_egress(struct __sk_buff *skb)
{
	return decide(skb, HOOK_EGRESS);
}
