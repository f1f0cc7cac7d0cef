/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * A packet generator inside the kernel: an XDP program that BPF_PROG_TEST_RUN runs on live frames. It makes each frame
 * the next packet of a list and passes it, so that it enters the stack as if it had come in on the interface. Time is
 * taken here, once a batch: the system call itself ends in a grace period and tells nothing.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
#include <linux/types.h>

#define FRAME_WORDS 8
#define BATCH 64
#define MAX_TUPLES 65536
#define MAX_BATCHES 8192
#define NR_GENERATORS 2
/* of a frame without VLAN tag */
#define IPV4_PROTOCOL 23
#define IPV4_CHECK 24
#define IPV4_SOURCE 26
#define IPV4_DESTINATION 30
#define SOURCE_PORT 34
#define DESTINATION_PORT 36

/* What one packet has of its own; the IPv4 header checksum comes with it. */
struct tuple {
	__be32 source;
	__be32 destination;
	__be16 source_port;
	__be16 destination_port;
	__u16 check;
	__u8 protocol;
	__u8 pad;
};

struct generator {
	__u64 made;
	__u32 tuples; /* how many of its tuples are in use */
	__u32 next;
	__u32 action; /* XDP_PASS; XDP_DROP shows what the generator alone costs */
	__u32 pad;
	__u64 frame[FRAME_WORDS];
};

BPF_F_TABLE("array:" PIN_MAPS "generators", u32, struct generator, generators, NR_GENERATORS, 1024);
BPF_F_TABLE("array:" PIN_MAPS "tuples", u32, struct tuple, tuples, NR_TUPLES, 1024);
/* when each batch began */
BPF_F_TABLE("array:" PIN_MAPS "batches", u32, u64, batches, NR_BATCH_TIMES, 1024);
/* which generator runs on a CPU */
BPF_F_TABLE("array:" PIN_MAPS "generator_of_cpu", u32, u64, generator_of_cpu, NR_CPUS, 1024);

int generate(struct xdp_md *xdp)
{
	__u8 *data = (__u8 *)(long)xdp->data, *end = (__u8 *)(long)xdp->data_end;
	__u32 cpu = bpf_get_smp_processor_id(), number, index;
	__u64 *found = generator_of_cpu.lookup(&cpu), *words = (__u64 *)data;
	struct generator *generator;
	struct tuple *tuple;

	if (!found || data + FRAME_WORDS * 8 > end)
		return XDP_ABORTED;
	number = (__u32)*found;
	generator = generators.lookup(&number);
	if (!generator)
		return XDP_ABORTED;
	if (generator->made % BATCH == 0) {
		index = number * MAX_BATCHES + (__u32)(generator->made / BATCH) % MAX_BATCHES;
		found = batches.lookup(&index);
		if (found)
			*found = bpf_ktime_get_ns();
	}
	generator->made++;
	index = number * MAX_TUPLES + generator->next;
	generator->next = generator->next + 1 < generator->tuples ? generator->next + 1 : 0;
	tuple = tuples.lookup(&index);
	if (!tuple)
		return XDP_ABORTED;
	/* all of it: a frame comes back as the stack left it */
#pragma unroll
	for (int i = 0; i < FRAME_WORDS; i++)
		words[i] = generator->frame[i];
	*(data + IPV4_PROTOCOL) = tuple->protocol;
	*(__u16 *)(data + IPV4_CHECK) = tuple->check;
	*(__be32 *)(data + IPV4_SOURCE) = tuple->source;
	*(__be32 *)(data + IPV4_DESTINATION) = tuple->destination;
	*(__be16 *)(data + SOURCE_PORT) = tuple->source_port;
	*(__be16 *)(data + DESTINATION_PORT) = tuple->destination_port;
	return generator->action;
}

/* An interface needs a native XDP program before live frames can enter it. */
int pass(struct xdp_md *xdp)
{
	return XDP_PASS;
}

/* The least that measures a packet's latency: one reading of the clock on each hook. */
int clock(struct __sk_buff *skb)
{
	skb->tc_index = bpf_ktime_get_ns();
	return TC_ACT_UNSPEC;
}

/* The floor: what being called costs a TC program that does nothing. */
int empty(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}
