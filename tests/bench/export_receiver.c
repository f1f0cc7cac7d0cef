/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * A collector that counts and drops: a million datagrams a second are too many for a socket. `whole` gets batches as the
 * sender handed them over and counts the datagrams in them. `cut` gets each datagram: a device with an XDP program has the
 * sending host take its batches apart.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

/* Ethernet, IPv4, UDP */
#define HEADER_BYTES 42
#define PORT_OFFSET 36

struct seen {
	__u64 packets;
	__u64 reports;
	__u64 bytes;
};

BPF_F_TABLE("array:" PIN_MAPS "seen", u32, struct seen, seen, 1, 1024);

static __always_inline void add(__u64 reports, __u64 bytes)
{
	u32 zero = 0;
	struct seen *sum = seen.lookup(&zero);

	if (!sum)
		return;
	__sync_fetch_and_add(&sum->packets, 1);
	__sync_fetch_and_add(&sum->reports, reports);
	__sync_fetch_and_add(&sum->bytes, bytes);
}

int whole(struct __sk_buff *skb)
{
	__u16 port = 0;

	if (bpf_skb_load_bytes(skb, PORT_OFFSET, &port, sizeof(port)) < 0)
		return TC_ACT_UNSPEC;
	if (port != bpf_htons(PORT))
		return TC_ACT_UNSPEC;
	/* a batch has its headers once */
	add(skb->gso_segs ? skb->gso_segs : 1, skb->len - HEADER_BYTES);
	return TC_ACT_SHOT;
}

int cut(struct xdp_md *frame)
{
	__u8 *data = (void *)(long)frame->data, *end = (void *)(long)frame->data_end;

	if (data + HEADER_BYTES > end || *(__u16 *)(data + PORT_OFFSET) != bpf_htons(PORT))
		return XDP_PASS;
	add(1, end - data - HEADER_BYTES);
	return XDP_DROP;
}
