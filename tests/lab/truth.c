// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Recorders. One runs right before the program under test and one right after it, on the same packet, in one go: no
 * other program of these runs on that CPU in between. So the two times bracket what the program under test saw as its
 * time, and each bracket says which packet it was.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

#define packet			 __sk_buff
#define load(skb, at, to, bytes) bpf_skb_load_bytes(skb, at, to, bytes)
#include "identity.h"

#define HOOK_INGRESS	 0
#define HOOK_EGRESS	 1
#define HOOK_DELIVER	 2
#define BACKGROUND_FIRST 21000
#define BACKGROUND_LAST	 21999

struct record {
	__u64 start_ns;
	struct identity identity;
	__u32 ifindex;
	__u32 ingress_ifindex; /* of HOOK_DELIVER: low half of the cookie of the socket's network namespace */
	__u32 duration_ns;
	__u16 segments;
	__u16 hook;
};

/* Of one CPU. The element behind the last CPU's is a gate for the senders: they pause while its count is 0. */
struct position {
	__u64 count;
	__u64 overflow; /* records that found no room */
	__u64 unpaired; /* brackets that were opened twice, or closed when none was open */
	__u64 open;
	__u64 packets;	     /* of the flows under test, of the wanted protocol, on ingress */
	__u64 super_packets; /* of these, those of more than one segment */
	__u64 first;	     /* count at the beginning of the run; set by user space */
	__u64 pad;
};

PINNED_MMAPABLE(truth_records, struct record, NR_TRUTH_RECORDS);
PINNED_MMAPABLE(truth_positions, struct position, NR_TRUTH_POSITIONS);
PINNED_MMAPABLE(truth_protocol, __u64, 1);

static __always_inline struct position *position_here(void)
{
	__u32 cpu = bpf_get_smp_processor_id();

	return truth_positions.lookup(&cpu);
}

static __always_inline struct record *record_at(__u64 count)
{
	__u32 index = bpf_get_smp_processor_id() * TRUTH_RECORDS_PER_CPU + (__u32)(count % TRUTH_RECORDS_PER_CPU);

	return truth_records.lookup(&index);
}

/* offsets are those of this kernel's BTF */
static __always_inline __u32 netns_of(struct __sk_buff *skb)
{
	struct position *position = position_here();
	__u64 at, cookie = 0;

	if (!position)
		return 0;
	position->pad = (__u64)skb;
	barrier();
	at = READ_ONCE(position->pad);
	bpf_probe_read_kernel(&at, sizeof(at), (void *)(at + SKB_DEV));
	bpf_probe_read_kernel(&at, sizeof(at), (void *)(at + DEV_NET));
	bpf_probe_read_kernel(&cookie, sizeof(cookie), (void *)(at + NET_COOKIE));
	return (__u32)cookie;
}

static __always_inline int open_bracket(struct __sk_buff *skb, __u32 hook)
{
	struct position *position = position_here();
	struct identity identity = {};
	struct record *record;

	if (!position)
		return TC_ACT_UNSPEC;
	if (position->count - position->first >= TRUTH_RECORDS_PER_CPU) {
		position->overflow++;
		return TC_ACT_UNSPEC;
	}
	record = record_at(position->count);
	if (!record)
		return TC_ACT_UNSPEC;
	if (position->open)
		position->unpaired++;
	if (hook == HOOK_DELIVER) {
		struct inet inet = {};

		/* what sockets are given begins with the IP header */
		if (read_inet(skb, 0, bpf_ntohs(skb->protocol), &identity, &inet) < 0)
			identity.protocol = 0;
	} else {
		identify(skb, &identity);
	}
	record->identity = identity;
	record->ifindex = skb->ifindex;
	record->ingress_ifindex = hook == HOOK_DELIVER ? netns_of(skb) : skb->ingress_ifindex;
	record->segments = skb->gso_segs;
	if (skb->gso_size && !skb->gso_segs)
		record->segments = 2; /* a CNI's program left the number to be found out later */
	record->hook = hook;
	record->duration_ns = 0;
	position->open = 1;
	record->start_ns = bpf_ktime_get_ns();
	return TC_ACT_UNSPEC;
}

static __always_inline void count_progress(struct position *position, const struct record *record)
{
	const struct identity *identity = &record->identity;
	__u32 zero = 0;
	__u64 *wanted = truth_protocol.lookup(&zero);

	if (!wanted || identity->protocol != *wanted)
		return;
	if ((identity->sport >= BACKGROUND_FIRST && identity->sport <= BACKGROUND_LAST) ||
	    (identity->dport >= BACKGROUND_FIRST && identity->dport <= BACKGROUND_LAST))
		return;
	position->packets++;
	if (record->segments > 1)
		position->super_packets++;
}

static __always_inline int close_bracket(__u32 hook)
{
	__u64 now = bpf_ktime_get_ns();
	struct position *position = position_here();
	struct record *record;

	if (!position || position->count - position->first >= TRUTH_RECORDS_PER_CPU)
		return TC_ACT_UNSPEC;
	record = record_at(position->count);
	if (!record)
		return TC_ACT_UNSPEC;
	if (!position->open || record->hook != hook) {
		position->unpaired++;
		return TC_ACT_UNSPEC;
	}
	record->duration_ns = (__u32)(now - record->start_ns);
	position->open = 0;
	position->count++;
	if (hook == HOOK_INGRESS)
		count_progress(position, record);
	return TC_ACT_UNSPEC;
}

int before_ingress(struct __sk_buff *skb)
{
	return open_bracket(skb, HOOK_INGRESS);
}

int after_ingress(struct __sk_buff *skb)
{
	return close_bracket(HOOK_INGRESS);
}

int before_egress(struct __sk_buff *skb)
{
	return open_bracket(skb, HOOK_EGRESS);
}

int after_egress(struct __sk_buff *skb)
{
	return close_bracket(HOOK_EGRESS);
}

/* cgroup_skb: 1 lets the packet pass */
int before_deliver(struct __sk_buff *skb)
{
	open_bracket(skb, HOOK_DELIVER);
	return 1;
}

int after_deliver(struct __sk_buff *skb)
{
	close_bracket(HOOK_DELIVER);
	return 1;
}
