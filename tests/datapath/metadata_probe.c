// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Stands in for int_host.c in a test: two programs that run before and after ours at one hook. The first fills with noise
 * what a TC program may write of a packet's metadata, both write down all that one can read.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

#define NR_PACKETS 16384

struct metadata {
	__u64 timestamp;
	__u32 length;
	__u32 linear_length;
	__u32 packet_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_protocol;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 hash;
	__u32 class_id;
	__u32 control_block[5];
	__u32 wire_length;
	__u32 gso_segments;
	__u32 gso_size;
	__u32 tc_index;
	__u32 timestamp_type;
	__u64 hardware_timestamp;
	__u64 data_meta_bytes;
};

PINNED_MMAPABLE(metadata_before, struct metadata, NR_PACKETS);
PINNED_MMAPABLE(metadata_after, struct metadata, NR_PACKETS);
/* packets seen by the first program, and by the second */
PINNED_MMAPABLE(packets_seen, __u64, 2);

static __always_inline __u32 next_place(__u32 program)
{
	__u64 *seen = packets_seen.lookup(&program);

	return seen ? __sync_fetch_and_add(seen, 1) & (NR_PACKETS - 1) : 0;
}

/* On ingress the kernel clears a time that is not the packet's own arrival; in a forwarding path it is kept. */
static __always_inline void set_tstamp(struct __sk_buff *skb)
{
	long (*set)(struct __sk_buff *skb, __u64 tstamp, __u32 type) = (void *)192; /* bpf_skb_set_tstamp */

	set(skb, ((__u64)bpf_get_prandom_u32() << 16) | 1, 1);
}

static __always_inline void write_down(struct __sk_buff *skb, struct metadata *to)
{
	to->timestamp = skb->tstamp;
	to->length = skb->len;
	to->linear_length = skb->data_end - skb->data;
	to->packet_type = skb->pkt_type;
	to->mark = skb->mark;
	to->queue_mapping = skb->queue_mapping;
	to->protocol = skb->protocol;
	to->vlan_present = skb->vlan_present;
	to->vlan_tci = skb->vlan_tci;
	to->vlan_protocol = skb->vlan_proto;
	to->priority = skb->priority;
	to->ingress_ifindex = skb->ingress_ifindex;
	to->ifindex = skb->ifindex;
	to->hash = skb->hash;
	to->class_id = skb->tc_classid;
	to->control_block[0] = skb->cb[0];
	to->control_block[1] = skb->cb[1];
	to->control_block[2] = skb->cb[2];
	to->control_block[3] = skb->cb[3];
	to->control_block[4] = skb->cb[4];
	to->wire_length = skb->wire_len;
	to->gso_segments = skb->gso_segs;
	to->gso_size = skb->gso_size;
	to->tc_index = skb->tc_index;
	to->timestamp_type = skb->tstamp_type;
	to->hardware_timestamp = skb->hwtstamp;
	to->data_meta_bytes = skb->data - skb->data_meta;
}

int ingress(struct __sk_buff *skb)
{
	__u32 place = next_place(0);
	struct metadata *before = metadata_before.lookup(&place);

	skb->mark = bpf_get_prandom_u32();
	skb->priority = bpf_get_prandom_u32();
	skb->tc_index = bpf_get_prandom_u32() & 0xffff;
	skb->tc_classid = bpf_get_prandom_u32();
	skb->queue_mapping = bpf_get_prandom_u32() & 0xfffe; /* the field holds one more, and 0 for none */
	bpf_set_hash(skb, bpf_get_prandom_u32());
	set_tstamp(skb);
	skb->cb[0] = bpf_get_prandom_u32();
	skb->cb[1] = bpf_get_prandom_u32();
	skb->cb[2] = bpf_get_prandom_u32();
	skb->cb[3] = bpf_get_prandom_u32();
	skb->cb[4] = bpf_get_prandom_u32();
	if (before)
		write_down(skb, before);
	return TC_ACT_UNSPEC;
}

int egress(struct __sk_buff *skb)
{
	__u32 place = next_place(1);
	struct metadata *after = metadata_after.lookup(&place);

	if (after)
		write_down(skb, after);
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
