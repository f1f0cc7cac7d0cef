/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Rings and the wire: a report is written here as finished Telemetry Report v0.5 bytes, once, into its ring record. */
#pragma once
#include "counters.h"
#include "fingerprint.h"

/* Telemetry Report v0.5, fixed header: NProto 1 = drop header follows, 2 = switch-local header follows. */
#define V05_NPROTO_DROP (1U << 24)
#define V05_NPROTO_LOCAL (2U << 24)
#define V05_D (1U << 23)
#define V05_Q (1U << 22)
#define V05_F (1U << 21)
#define V05_LOCAL_BYTES 28
#define V05_DROP_BYTES 24
#define HW_ID_CPU_MASK 31
#define HW_ID_DROP 32

#define RATE_WINDOW_NS 100000000ULL
#define RATE_WINDOWS_PER_SECOND 10
#define RATE_USED ((1ULL << RATE_USED_BITS) - 1)

/* A ring record being written. */
struct record {
	__u8 *bytes;
	struct report_iov *iov;
	struct ring_position *head;
	struct ring_position *tail;
	__u32 hw_id;
	__u32 sequence;
};

enum reserve_result {
	RESERVED = 0,
	RESERVE_RATE_LIMITED = 1,
	RESERVE_RING_FULL = 2,
};

/*
 * Count one report against its collector's limit: fixed windows of 100 ms, none of which lets more than its share through on
 * all CPUs together. Number and count of a window are one word, so that whoever opens one takes the first place in it.
 */
static __always_inline bool within_rate(__u32 collector, __u32 reports_per_second, __u64 now)
{
	struct rate_window *window;
	__u64 share = reports_per_second / RATE_WINDOWS_PER_SECOND;
	__u64 number = now / RATE_WINDOW_NS, seen;

	if (!reports_per_second)
		return true;
	window = rate_windows.lookup(&collector);
	if (!window)
		return true;
	seen = READ_ONCE(window->state);
	/* whoever loses the exchange finds the window open */
	if ((seen >> RATE_USED_BITS) < number &&
	    __sync_val_compare_and_swap(&window->state, seen, (number << RATE_USED_BITS) | 1) == seen)
		return true;
	return (__sync_fetch_and_add(&window->state, 1) & RATE_USED) < (share ? share : 1);
}

/*
 * Take the next record of this CPU's ring of one kind. The sequence number is taken before the full test: a report that
 * finds no room shows as a gap at the collector. One writer per ring at a time: TC programs run with softirqs off, the
 * tracepoint program has a ring of its own, and who interrupts an interruptible writer finds the ring busy.
 */
static __always_inline enum reserve_result reserve_record(enum ring_kind kind, __u32 collector_index,
							   const struct collector *collector, __u64 now,
							   struct record *record, bool interruptible)
{
	__u32 cpu = bpf_get_smp_processor_id();
	__u32 ring = cpu * RINGS_PER_CPU + kind;
	__u32 sequence_index = ring * MAX_COLLECTORS + (collector_index & (MAX_COLLECTORS - 1));
	__u32 index;
	__u64 *sequence, *to;
	struct ring_position *head, *tail;
	struct report_record *bytes;

	if (!within_rate(collector_index, collector->reports_per_second, now))
		return RESERVE_RATE_LIMITED;
	sequence = sequences.lookup(&sequence_index);
	head = ring_heads.lookup(&ring);
	tail = ring_tails.lookup(&ring);
	if (!sequence || !head || !tail)
		return RESERVE_RING_FULL;
	record->sequence = interruptible ? (__u32)__sync_fetch_and_add(sequence, 1) + 1 : (__u32)++*sequence;
	if (unlikely(READ_ONCE(head->busy)))
		return RESERVE_RING_FULL;
	if (interruptible)
		WRITE_ONCE(head->busy, 1);
	if (head->value - READ_ONCE(tail->value) >= RING_RECORDS) {
		if (interruptible)
			WRITE_ONCE(head->busy, 0);
		return RESERVE_RING_FULL;
	}
	index = ring * RING_RECORDS + ((__u32)head->value & (RING_RECORDS - 1));
	bytes = report_records.lookup(&index);
	record->iov = report_iovs.lookup(&index);
	to = report_collectors.lookup(&index);
	/* never: what the verifier wants to hear */
	if (!bytes || !record->iov || !to)
		return RESERVE_RING_FULL;
	*to = collector_index;
	record->bytes = bytes->bytes;
	record->head = head;
	record->tail = tail;
	record->hw_id = (cpu & HW_ID_CPU_MASK) | (kind == RING_DROP ? HW_ID_DROP : 0);
	return RESERVED;
}

/*
 * Wake the agent. It looks once more a little after it has said that it sleeps, so a program that read the word just before
 * need not be ordered with it; this load is all that a report usually pays, and its cache line has been read already.
 */
static __always_inline void ring_bell(struct ring_position *tail)
{
	__u64 nothing = 0;

	if (__sync_lock_test_and_set(&tail->asleep, 0))
		bell.ringbuf_output(&nothing, sizeof(nothing), BPF_RB_FORCE_WAKEUP);
}

/* Hand the record to the agent: its bytes are complete. */
static __always_inline void commit_record(struct record *record, __u32 bytes, bool interruptible)
{
	record->iov->len = bytes;
	publish(&record->head->value, record->head->value + 1);
	if (interruptible)
		WRITE_ONCE(record->head->busy, 0);
	if (unlikely(READ_ONCE(record->tail->asleep)))
		ring_bell(record->tail);
}

static __always_inline __u16 port_id(__u32 ifindex)
{
	__u64 *port;

	if (!ifindex)
		return 0;
	port = ports.lookup(&ifindex);
	return port ? (__u16)*port : 0;
}

/* The same of an interface that our TC programs are attached to, which therefore has one. */
static __always_inline __u16 attached_port_id(const struct config *config, __u32 ifindex)
{
	if (likely(READ_ONCE(config->port_is_ifindex)))
		return (__u16)ifindex;
	return port_id(ifindex);
}

static __always_inline void put_be32(__u8 *bytes, __u32 value)
{
	*(__be32 *)bytes = bpf_htonl(value);
}

/* Telemetry Report v0.5, switch-local header (NProto 2). Times are wall clock, low 32 bits. */
static __always_inline void put_v05_local(const struct record *record, const struct config *config,
					  __u32 flags, __u64 ingress_ns, __u64 egress_ns,
					  __u16 ingress_port, __u16 egress_port)
{
	/* once for both stamps: the agent refreshes it while programs run */
	__u64 wall_offset_ns = READ_ONCE(config->wall_offset_ns);
	__u8 *bytes = record->bytes;

	put_be32(bytes, V05_NPROTO_LOCAL | flags | record->hw_id);
	put_be32(bytes + 4, record->sequence);
	put_be32(bytes + 8, (__u32)(ingress_ns + wall_offset_ns));
	put_be32(bytes + 12, config->node_id);
	put_be32(bytes + 16, ((__u32)ingress_port << 16) | egress_port);
	put_be32(bytes + 20, 0); /* queue id and occupancy: the kernel gives TC programs neither */
	put_be32(bytes + 24, (__u32)(egress_ns + wall_offset_ns));
}

/* Telemetry Report v0.5, drop header (NProto 1). */
static __always_inline void put_v05_drop(const struct record *record, const struct config *config,
					 __u32 flags, __u64 ingress_ns, __u16 ingress_port,
					 __u16 egress_port, __u8 reason)
{
	__u8 *bytes = record->bytes;

	put_be32(bytes, V05_NPROTO_DROP | flags | record->hw_id);
	put_be32(bytes + 4, record->sequence);
	put_be32(bytes + 8, (__u32)(ingress_ns + config->wall_offset_ns));
	put_be32(bytes + 12, config->node_id);
	put_be32(bytes + 16, ((__u32)ingress_port << 16) | egress_port);
	put_be32(bytes + 20, (__u32)reason << 16);
}

/*
 * Write the tuple as it came in over the one of a packet that was translated since, so that the report shows what
 * matched. The IPv4 header checksum follows (RFC 1624); the L4 checksum does not: offload leaves it unfinished anyway.
 */
static __always_inline void restore_tuple(__u8 *packet, __u32 snapshot_bytes, const struct flow_key *key,
					  const struct packet_offsets *offsets)
{
	__u32 network = offsets->network & 31;
	__u32 transport = offsets->transport & 127;
	__u8 *ip = packet + network;

	if (key->family == 4) {
		__be32 *addresses = (__be32 *)(ip + 12);
		__u16 *check = (__u16 *)(ip + 10);
		__u64 sum;

		if (network + 20 > snapshot_bytes)
			return;
		sum = (__u16)~*check;
		sum += (__u32)~addresses[0];
		sum += (__u32)~addresses[1];
		sum += key->source[0];
		sum += key->destination[0];
		*check = ~fold_sum(sum);
		addresses[0] = key->source[0];
		addresses[1] = key->destination[0];
	} else {
		if (network + 40 > snapshot_bytes)
			return;
		__builtin_memcpy(ip + 8, key->source, 16);
		__builtin_memcpy(ip + 24, key->destination, 16);
	}
	if (key->no_ports || key->protocol == PROTO_ICMP || key->protocol == PROTO_ICMPV6)
		return;
	if (offsets->transport <= SNAP_BYTES - 4 && transport + 4 <= snapshot_bytes) {
		*(__be16 *)(packet + transport) = bpf_htons(key->source_port);
		*(__be16 *)(packet + transport + 2) = bpf_htons(key->destination_port);
	}
}

/*
 * 1..SNAP_BYTES in a form whose bounds the verifier sees: compared bounds get lost when LLVM merges the comparisons.
 * Callers have made sure that bytes is in that range.
 */
static __always_inline __u32 bounded(__u32 bytes)
{
	asm volatile("" : "+r"(bytes));
	return ((bytes - 1) & (SNAP_BYTES - 1)) + 1;
}

/* Copy the packet's bytes from an offset on behind the report header; the number of bytes, 0 if none could be read. */
static __always_inline __u32 put_snapshot(struct __sk_buff *skb, __u32 from, __u8 *to, __u32 snap_length)
{
	__u32 bytes = skb->len - from < snap_length ? skb->len - from : snap_length;

	if (bytes == 0 || bytes > SNAP_BYTES)
		return 0;
	bytes = bounded(bytes);
	if (bpf_skb_load_bytes(skb, from, to, bytes) < 0) {
		count(COUNT_SNAPSHOT_FAILED);
		return 0;
	}
	return bytes;
}

static __always_inline void put_ethernet_header(__u8 *to, const struct flow_key *key)
{
	__builtin_memset(to, 0, ETHERNET_HEADER_BYTES);
	*(__be16 *)(to + ETHERNET_HEADER_BYTES - 2) =
		key->family == 4 ? bpf_htons(ETHERTYPE_IPV4) : bpf_htons(ETHERTYPE_IPV6);
}

/* As restore_tuple, of a snapshot that begins with a plain Ethernet header. */
static __always_inline void restore_plain_tuple(__u8 *packet, __u32 bytes, const struct flow_key *key,
						struct packet_offsets *offsets)
{
	offsets->network = ETHERNET_HEADER_BYTES;
	offsets->transport = ETHERNET_HEADER_BYTES +
			     (key->family == 4 ? (packet[ETHERNET_HEADER_BYTES] & 15) * 4 : IPV6_BYTES);
	/* through memory: what LLVM knows of it, and therefore leaves out, the verifier does not */
	barrier();
	restore_tuple(packet, bytes, key, offsets);
}

/*
 * Headers that say no more than the tuple, of a packet whose own headers are gone, or as much of them as a snapshot may have;
 * the number of bytes.
 */
static __always_inline __u32 put_headers(__u8 *to, const struct flow_key *key, __u32 snap_length)
{
	__u32 ip_bytes = key->family == 4 ? IPV4_MIN_BYTES : IPV6_BYTES;
	__u8 *ip = to + ETHERNET_HEADER_BYTES;
	__u8 *transport = ip + ip_bytes;

	put_ethernet_header(to, key);
	__builtin_memset(ip, 0, IPV6_BYTES + UDP_BYTES);
	if (key->family == 4) {
		__u64 sum = 0x4500 + IPV4_MIN_BYTES + UDP_BYTES + key->protocol;

		ip[0] = 0x45;
		ip[3] = IPV4_MIN_BYTES + UDP_BYTES;
		ip[9] = key->protocol;
		*(__be32 *)(ip + 12) = key->source[0];
		*(__be32 *)(ip + 16) = key->destination[0];
		sum = bpf_htons((__u16)sum);
		sum += (__u64)key->source[0] + key->destination[0];
		*(__u16 *)(ip + 10) = ~fold_sum(sum);
	} else {
		ip[0] = 0x60;
		ip[5] = UDP_BYTES;
		ip[6] = key->protocol;
		__builtin_memcpy(ip + 8, key->source, 16);
		__builtin_memcpy(ip + 24, key->destination, 16);
	}
	if (key->protocol == PROTO_UDP) {
		*(__be16 *)transport = bpf_htons(key->source_port);
		*(__be16 *)(transport + 2) = bpf_htons(key->destination_port);
		transport[5] = UDP_BYTES;
	}
	ip_bytes += ETHERNET_HEADER_BYTES + UDP_BYTES;
	return ip_bytes < snap_length ? ip_bytes : snap_length;
}
