/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* What becomes of a watched packet that got where it was going: it is counted, and reported if that is news. */
#pragma once
#include "flow.h"
#include "policy.h"
#include "report.h"
#include "skb.h"

/* One watched packet on its way to a report. */
struct observation {
	const struct flow_key *key; /* the tuple that matched */
	__u64 ingress_ns;
	__u64 egress_ns; /* 0: now; reading the clock costs more than all else here, so only who needs it does */
	__u32 ingress_ifindex; /* 0: the host sent it */
	__u32 egress_ifindex;  /* 0: the host takes it */
	bool translated;       /* the packet no longer carries key */
};

/* Where a packet is read from, one of the two pointers being NULL; and whether TC programs may interrupt the reader. */
struct packet_source {
	struct __sk_buff *context;
	const struct kernel_skb *skb;
	bool interruptible;
};

/*
 * The start of the packet with the tuple that matched; the number of bytes. Where that is the tuple of the packet inside a
 * tunnel, its headers are shown; where it is the tuple of a tunnel that the packet has left, headers are made of it.
 */
static __always_inline __u32 put_packet(struct __sk_buff *context, const struct observation *seen,
					const struct config *config, struct scratch *scratch, __u8 *to,
					__u32 snap_length)
{
	struct packet_offsets *offsets = &scratch->offsets;
	bool in_tunnel, was_in_tunnel;
	__u32 bytes;

	if (likely(!seen->translated))
		return put_snapshot(context, 0, to, snap_length);
	in_tunnel = offsets->inner != 0;
	was_in_tunnel = is_tunnel(seen->key, &config->tunnels);
	if (was_in_tunnel && !in_tunnel)
		return put_headers(to, seen->key, snap_length);
	if (in_tunnel && !was_in_tunnel) {
		/* what is before an IP header in an IP packet is overwritten */
		bytes = put_snapshot(context, offsets->inner - ETHERNET_HEADER_BYTES, to, snap_length);
		put_ethernet_header(to, seen->key);
		restore_plain_tuple(to, bytes, seen->key, offsets);
		return bytes;
	}
	bytes = put_snapshot(context, 0, to, snap_length);
	restore_tuple(to, bytes, seen->key, offsets);
	return bytes;
}

/* Write a flow or queue report, or count why not. Returns true when it was written. */
static __always_inline bool write_report(const struct packet_source source, const struct config *config, __u32 side,
					 const struct policy *policy, const struct observation *seen,
					 struct scratch *scratch, __u64 egress_ns, __u32 flags,
					 struct watchlist_counters *counters)
{
	const struct collector *collector = collector_of(side, policy->collector);
	struct record record = {};
	enum reserve_result result;
	__u32 bytes;

	if (!collector)
		return false;
	if (unlikely(config->hold)) {
		add(&counters->suppressed, 1, source.interruptible);
		return false;
	}
	result = reserve_record(RING_FLOW, policy->collector, collector, egress_ns, &record, source.interruptible);
	if (result == RESERVE_RATE_LIMITED) {
		add(&counters->rate_limited, 1, source.interruptible);
		return false;
	}
	if (result == RESERVE_RING_FULL) {
		add(&counters->ring_full, 1, source.interruptible);
		return false;
	}
	put_v05_local(&record, config, flags, seen->ingress_ns, egress_ns,
		      attached_port_id(config, seen->ingress_ifindex), attached_port_id(config, seen->egress_ifindex));
	/* asked of the one that the compiler knows to be NULL or not */
	if (!source.skb)
		bytes = put_packet(source.context, seen, config, scratch, record.bytes + V05_LOCAL_BYTES, collector->snap_length);
	else
		bytes = put_skb_packet(source.skb, seen->translated, config, scratch, record.bytes + V05_LOCAL_BYTES,
				       collector->snap_length, COUNT_SNAPSHOT_FAILED);
	commit_record(&record, V05_LOCAL_BYTES + bytes, source.interruptible);
	add(&counters->reported, 1, source.interruptible);
	return true;
}

/* Decide on a watched packet that was forwarded, sent or delivered; every path counts exactly one outcome. */
static __always_inline void observe(const struct packet_source source, const struct config *config, __u32 side,
				    __u16 watchlist, const struct observation *seen, struct scratch *scratch)
{
	struct watchlist_counters *counters = counters_of(COUNTERS_TC, watchlist);
	const struct policy *policy = policy_of(side, watchlist);
	__u64 hash = flow_hash(seen->key), now = seen->egress_ns, latency_ns;
	struct flow_state state;
	struct flow *flow;
	__u32 due;
	bool known, congested;

	if (!counters || !policy)
		return;
	if (unlikely(!(policy->events & (EVENT_FLOW | EVENT_QUEUE)))) {
		add(&counters->not_asked, 1, source.interruptible);
		return;
	}
	if (unlikely(!is_sampled(hash, policy->sample))) {
		add(&counters->sampled_out, 1, source.interruptible);
		return;
	}
	flow = find_flow(hash, &known);
	if (!flow)
		return;
	if (!now && !needs_latency(policy) && is_nothing_new(flow, known, policy, seen->ingress_ns, seen->egress_ifindex)) {
		add(&counters->suppressed, 1, source.interruptible);
		return;
	}
	if (!now)
		now = bpf_ktime_get_ns();
	/* this CPU's clock may be some ns behind that of the arrival */
	if (unlikely((__s64)(now - seen->ingress_ns) < 0))
		now = seen->ingress_ns;
	latency_ns = now - seen->ingress_ns;
	congested = policy->congestion_latency_ns && latency_ns >= policy->congestion_latency_ns;
	state = flow_state_of(latency_ns, seen->egress_ifindex, congested);
	due = due_events(flow, known, policy, now, state);
	if (likely(!due)) {
		add(&counters->suppressed, 1, source.interruptible);
		return;
	}
	if (write_report(source, config, side, policy, seen, scratch, now,
			 ((due & EVENT_FLOW) ? V05_F : 0) | (congested ? V05_Q : 0), counters))
		remember_flow(flow, known, hash, now, state, COUNT_FLOW_EVICTED);
}
