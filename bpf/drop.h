/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Drop reports: what the kernel says about a packet that dies, checked against the slot that its address leads to. */
#pragma once
#include "classify.h"
#include "flow.h"
#include "policy.h"
#include "report.h"
#include "slot.h"

#define MAC_HEADER_UNSET 0xffff
/* the print is in the upper end of a tuple's last word */
#define PRINT_BITS 8
#define ETHERNET_BYTES 14
#define ETHERTYPE_OFFSET 12
/* behind which a snapshot's tuple is not restored: two VLAN tags fit */
#define MAX_LINK_HEADER_BYTES 30
#define INT_REASON_TTL 26
#define IPV4_TTL_OFFSET 8
#define IPV6_HOP_LIMIT_OFFSET 7
/* type << 8 | code */
#define ICMP_ECHO_REPLY 0
#define ICMPV6_ECHO_REPLY (129 << 8)
#define SUBSYSTEM_SHIFT 16
#define SUBSYSTEM_INDEX 256
/* spreads the drop reasons of one flow over the flow table, away from the flow itself */
#define REASON_HASH 0x9fb21c651e98df25ULL

/* What its slot told of the packet; its tuple as it came in is in scratch->arrived. */
struct arrival {
	__u64 arrival_ns;
	__u32 ifindex;
};

/* What is read of the dying sk_buff; offsets come from BTF by way of the config. */
struct dead_packet {
	__u64 head;
	__u32 tail;
	__u16 mac_header;
	__u16 network_header;
	__u16 tc_index;
	__u32 iif;
};

#define READ_FIELD(destination, base, offset) \
	bpf_probe_read_kernel(&(destination), sizeof(destination), (void *)((base) + (offset)))

static __always_inline void read_dead_packet(struct dead_packet *dead, __u64 address, const struct config *config)
{
	READ_FIELD(dead->tc_index, address, config->skb_tc_index);
	READ_FIELD(dead->iif, address, config->skb_iif);
	READ_FIELD(dead->head, address, config->skb_head);
	READ_FIELD(dead->tail, address, config->skb_tail);
	READ_FIELD(dead->mac_header, address, config->skb_mac_header);
	READ_FIELD(dead->network_header, address, config->skb_network_header);
}

/* One kernel may hold many nodes (and every pod): only what dies in our own network namespace is ours. */
static __always_inline bool died_elsewhere(__u64 address, const struct config *config, __u32 *ifindex)
{
	__u64 device = 0, net = 0, cookie = 0;

	READ_FIELD(device, address, config->skb_dev);
	if (!device)
		return false; /* queued at a socket: no device any more */
	READ_FIELD(*ifindex, device, config->dev_ifindex);
	READ_FIELD(net, device, config->dev_net);
	READ_FIELD(cookie, net, config->net_cookie);
	return cookie != config->netns_cookie;
}

/*
 * The tuple as it is now, for a packet that was translated since it came in, and its print. Later headers than the first are not
 * followed: what is not known then is `unknown`.
 */
static __always_inline void read_tuple(struct flow_key *key, const struct dead_packet *dead,
				       const struct tunnel_ports *tunnels, __u8 unknown)
{
	__u64 ip = dead->head + dead->network_header;
	__u32 header_bytes = IPV6_BYTES, own = 0;
	__u8 transport[24] __attribute__((aligned(8))) = {}, first = 0;
	__be16 fragment = 0, id = 0;
	__s32 behind;

	__builtin_memset(key, 0, sizeof(*key));
	READ_FIELD(first, ip, 0);
	if (first >> 4 == 4) {
		header_bytes = (first & 15) * 4;
		key->family = 4;
		READ_FIELD(key->source[0], ip, 12);
		READ_FIELD(key->destination[0], ip, 16);
		READ_FIELD(key->protocol, ip, 9);
		READ_FIELD(fragment, ip, 6);
		READ_FIELD(id, ip, 4);
		key->no_ports = (fragment & bpf_htons(0x1fff)) != 0;
		own = id;
	} else {
		key->family = 6;
		READ_FIELD(key->source, ip, 8);
		READ_FIELD(key->destination, ip, 24);
		READ_FIELD(key->protocol, ip, 6);
		READ_FIELD(own, ip, 0);
		own &= IPV6_FLOW_LABEL;
	}
	behind = dead->tail - dead->network_header - header_bytes;
	if (behind >= (__s32)sizeof(transport))
		READ_FIELD(transport, ip, header_bytes);
	else if (behind >= 8)
		READ_FIELD(*(__u64 *)transport, ip, header_bytes);
	else
		key->no_ports = 1;
	if (key->protocol == PROTO_TCP || key->protocol == PROTO_UDP || key->protocol == PROTO_SCTP) {
		key->source_port = read_be16(transport);
		key->destination_port = read_be16(transport + 2);
	} else if (key->protocol == PROTO_ICMP || key->protocol == PROTO_ICMPV6) {
		key->destination_port = read_be16(transport);
	} else {
		key->no_ports = 1;
	}
	/* of a shorter packet the rest is zeros, which change nothing */
	if (!key->no_ports)
		own ^= transport_print_of(key->protocol, transport, transport + sizeof(transport));
	key->print = packet_print(own);
	if (is_extension_header(key->protocol) || key->protocol == PROTO_IPV4 || key->protocol == PROTO_IPV6 ||
	    (key->protocol == PROTO_UDP && is_tunnel_port(key->destination_port, tunnels)))
		key->print = unknown;
}

/* Copy the first bytes of the dead packet: its linear part from the Ethernet header on; the number of bytes. */
static __always_inline __u32 put_dead_snapshot(const struct dead_packet *dead, const struct flow_key *key, __u8 *to,
					       __u32 snap_length)
{
	__u32 start = dead->mac_header, skipped = 0, bytes;

	if (dead->mac_header == MAC_HEADER_UNSET || dead->mac_header == dead->network_header) {
		/* no Ethernet header (any more): one of zeros, with the right type */
		start = dead->network_header;
		skipped = ETHERNET_BYTES;
		__builtin_memset(to, 0, ETHERNET_BYTES);
		*(__be16 *)(to + ETHERTYPE_OFFSET) = key->family == 4 ? bpf_htons(0x0800) : bpf_htons(0x86dd);
	}
	if (dead->tail <= start)
		return skipped;
	bytes = dead->tail - start;
	if (bytes > snap_length - skipped)
		bytes = snap_length - skipped;
	if (bytes == 0 || bytes > SNAP_BYTES)
		return skipped;
	bytes = bounded(bytes);
	if (bpf_probe_read_kernel(to + skipped, bytes, (void *)(dead->head + start)) < 0) {
		count(COUNT_DROP_SNAPSHOT_FAILED);
		return skipped;
	}
	return skipped + bytes;
}

static __always_inline __u8 refine_reason(const struct drop_reason *reason, const struct dead_packet *dead,
					  const struct flow_key *key)
{
	__u32 offset = key->family == 4 ? IPV4_TTL_OFFSET : IPV6_HOP_LIMIT_OFFSET;
	__u8 ttl = 0xff;

	if (!(reason->flags & DROP_CHECK_TTL))
		return reason->code;
	READ_FIELD(ttl, dead->head + dead->network_header, offset);
	return ttl <= 1 ? INT_REASON_TTL : reason->code;
}

/* Put the tuple that matched into the snapshot of a packet that was translated since it came in. */
static __always_inline void restore_dead_tuple(const struct dead_packet *dead, struct scratch *scratch, __u8 *packet,
					       __u32 bytes)
{
	struct packet_offsets *offsets = &scratch->offsets;
	const struct flow_key *key = &scratch->key;
	__u16 network = ETHERNET_BYTES;
	__u8 first = 0;

	if (dead->mac_header != MAC_HEADER_UNSET && dead->mac_header != dead->network_header)
		network = dead->network_header - dead->mac_header;
	if (network > MAX_LINK_HEADER_BYTES)
		return;
	READ_FIELD(first, dead->head + dead->network_header, 0);
	offsets->network = network;
	offsets->transport = network + (key->family == 4 ? (first & 15) * 4 : IPV6_BYTES);
	/* through memory: what LLVM knows of it, and therefore leaves out, the verifier does not */
	barrier();
	restore_tuple(packet, bytes, key, offsets);
}

/* Decide on a watched packet that died and write its report; every path counts exactly one outcome. */
static __always_inline void report_drop(const struct config *config, __u32 side, __u16 watchlist,
					struct watchlist_counters *counters, const struct arrival *arrival,
					struct scratch *scratch, const struct dead_packet *dead,
					const struct drop_reason *reason, __u32 egress_ifindex)
{
	const struct flow_key *key = &scratch->key;
	const struct policy *policy = policy_of(side, watchlist);
	struct flow_state state = {};
	const struct collector *collector;
	__u8 code = refine_reason(reason, dead, key);
	__u64 hash = flow_hash(key), drop_hash, now = bpf_ktime_get_ns();
	struct record record = {};
	struct flow *flow;
	enum reserve_result result;
	__u32 bytes;
	bool known;

	if (!policy)
		return;
	collector = collector_of(side, policy->collector);
	if (!collector)
		return;
	if (!(policy->events & EVENT_DROP) || !(reason->flags & DROP_REPORT)) {
		counters->drops_not_asked++;
		return;
	}
	if (!is_sampled(hash, policy->sample)) {
		counters->drops_sampled_out++;
		return;
	}
	drop_hash = (hash ^ (code * REASON_HASH)) | 1;
	flow = find_flow(drop_hash, &known);
	if (!flow)
		return;
	if (known && now - flow->reported_ns < policy->interval_ns) {
		counters->drops_suppressed++;
		return;
	}
	if (config->hold) {
		counters->drops_suppressed++;
		return;
	}
	result = reserve_record(RING_DROP, policy->collector, collector, now, &record);
	if (result == RESERVE_RATE_LIMITED) {
		counters->drops_rate_limited++;
		return;
	}
	if (result == RESERVE_RING_FULL) {
		counters->drops_ring_full++;
		return;
	}
	put_v05_drop(&record, config, V05_D | ((reason->flags & DROP_QUEUE) ? V05_Q : 0), arrival->arrival_ns,
		     port_id(arrival->ifindex), port_id(egress_ifindex), code);
	bytes = put_dead_snapshot(dead, key, record.bytes + V05_DROP_BYTES, collector->snap_length);
	if (scratch->translated)
		restore_dead_tuple(dead, scratch, record.bytes + V05_DROP_BYTES, bytes);
	commit_record(&record, V05_DROP_BYTES + bytes);
	remember_flow(flow, known, drop_hash, now, state, COUNT_DROP_EVICTED);
	counters->drops_reported++;
}

static __always_inline __u32 reason_index(__u32 reason)
{
	return (reason & 0xff) | (reason >> SUBSYSTEM_SHIFT ? SUBSYSTEM_INDEX : 0);
}

/*
 * Whether NAT has changed a packet since it came in. Another protocol is no translation, but headers that were not followed.
 * Without branches, each of which would double what the verifier has to walk.
 */
static __always_inline __u32 is_translated(const struct flow_key *now, const struct flow_key *arrived)
{
	const __u64 *a = (const __u64 *)now, *b = (const __u64 *)arrived;
	__u64 rest = a[4] ^ b[4];
	__u64 differing = (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | rest;

	/* protocol, family and no_ports are in the upper half of the last word */
	return (rest >> 32 == 0) & (differing != 0);
}

/*
 * Judge a packet that died as one that leaves: by the tuple that it has now if NAT has changed it, and if that is in no rule, by
 * the verdict that it got on arrival. Returns the watchlist that it is reported for, 0 if for none; the tuple that matched is in scratch->key then.
 */
static __always_inline __u16 judge_death(struct scratch *scratch, __u16 watched_for, __u32 side)
{
	struct verdict verdict = {};

	scratch->translated = is_translated(&scratch->key, &scratch->arrived);
	if ((scratch->translated || !watched_for) &&
	    (classify(&scratch->key, scratch, &verdict, side, false) & CLASSIFY_MATCH)) {
		scratch->translated = 0;
		return verdict.action == ACTION_REPORT ? verdict.watchlist : 0;
	}
	scratch->key = scratch->arrived;
	return watched_for;
}

/*
 * Freed as dropped, though it has reached those whom it was for: an echo reply is read as a clone, by a raw socket, and
 * of a group's frame that a bridge floods, the host gets the original.
 */
static __always_inline bool is_no_death(const struct drop_reason *reason, const struct flow_key *key,
					const struct dead_packet *dead)
{
	__u8 first = 0;

	if (reason->flags & DROP_NOT_ECHO_REPLY)
		return (key->protocol == PROTO_ICMP && key->destination_port == ICMP_ECHO_REPLY) ||
		       (key->protocol == PROTO_ICMPV6 && key->destination_port == ICMPV6_ECHO_REPLY);
	if (!(reason->flags & DROP_NOT_GROUP) || dead->mac_header == MAC_HEADER_UNSET ||
	    dead->mac_header == dead->network_header)
		return false;
	READ_FIELD(first, dead->head + dead->mac_header, 0);
	return first & 1;
}

/* The packet has ended, but not in a way that is a drop of ours. */
static __always_inline void end_unseen(struct slot *slot, __u64 owner)
{
	struct watchlist_counters *counters;

	if (!exchange_owner(slot, owner, 0))
		return;
	if (owner_state(owner) != SLOT_PENDING || !owner_watchlist(owner))
		return;
	counters = counters_of(COUNTERS_DROP, owner_watchlist(owner));
	if (counters)
		counters->unresolved++;
}

/* As shares_a_side, of a packet of which only the first header behind the addresses was read. */
static __always_inline bool shares_an_address(const struct flow_key *one, const struct flow_key *other)
{
	const __u64 *a = (const __u64 *)one->source, *b = (const __u64 *)other->source;
	const __u64 *c = (const __u64 *)one->destination, *d = (const __u64 *)other->destination;

	return one->family == other->family &&
	       ((a[0] == b[0] && a[1] == b[1]) || (c[0] == d[0] && c[1] == d[1]));
}

/*
 * Whether its print says that a dying packet is not the one that came in. Of IPv6 fragments that were put together nothing is left
 * that their print was made of, so there a tuple that is the same is enough.
 */
static __always_inline bool has_another_print(const struct flow_key *now, const struct flow_key *arrived)
{
	const __u64 *a = (const __u64 *)now, *b = (const __u64 *)arrived;
	__u64 differing = (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | ((a[4] ^ b[4]) << PRINT_BITS);

	return !may_be_same_packet(now, arrived) && (now->family == 4 || differing);
}

/* A packet that has the address of a watched one was freed as dropped; its tag says in which slot to look. */
static __always_inline void observe_drop(__u64 address, __u32 kernel_reason, struct scratch *scratch)
{
	const struct config *config = current_config();
	__u32 index = reason_index(kernel_reason), side = side_of(live_generation()), ifindex = 0;
	const struct drop_reason *reason = drop_reasons.lookup(&index);
	struct watchlist_counters *counters;
	__u16 watched_for, watchlist;
	enum slot_state state;
	struct slot *slot;
	__u64 owner;
	struct arrival arrival;
	struct dead_packet dead = {};
	enum proof proof;
	__u64 *total;

	if (!config || !config->enabled || !reason)
		return;
	read_dead_packet(&dead, address, config);
	slot = find_slot(address, dead.tc_index);
	if (!slot)
		return;
	owner = READ_ONCE(slot->owner);
	if (!is_owner(owner, address)) {
		count(COUNT_STALE_DROP);
		return;
	}
	watched_for = owner_watchlist(owner);
	/* apart from the word that it is in, or the verifier learns of both at once and walks the classifier twice */
	asm volatile("" : "+r"(watched_for));
	state = owner_state(owner);
	arrival.arrival_ns = slot->arrival_ns;
	arrival.ifindex = slot->ifindex;
	scratch->arrived = slot->key;
	read_tuple(&scratch->key, &dead, &config->tunnels, scratch->arrived.print);
	proof = proof_of(slot, dead.tc_index, dead.iif);
	/*
	 * One tag in some thousands is the same by chance (a clone's that waited at a socket, or one of another node of this
	 * kernel): print and addresses must agree as well, the latter but for a packet that has left, of which NAT may have
	 * changed both sides.
	 */
	if (proof == PROOF_NONE || (reason->flags & DROP_OF_COPY) ||
	    ((proof == PROOF_INTERFACE || state != SLOT_EGRESSED) &&
	     !shares_an_address(&scratch->key, &scratch->arrived)) ||
	    has_another_print(&scratch->key, &scratch->arrived)) {
		count(COUNT_STALE_DROP);
		return;
	}
	scratch->key.print = scratch->arrived.print;
	if (died_elsewhere(address, config, &ifindex))
		return;
	if (is_no_death(reason, &scratch->key, &dead)) {
		end_unseen(slot, owner);
		return;
	}
	if (state == SLOT_EGRESSED && !(reason->flags & DROP_AFTER_EGRESS))
		return;
	watchlist = judge_death(scratch, watched_for, side);
	if (!exchange_owner(slot, owner, 0))
		return;
	move_count(COUNTERS_DROP, watched_for, watchlist);
	counters = counters_of(COUNTERS_DROP, watchlist);
	total = drop_counters.lookup(&index);
	if (!watchlist || !counters || !total)
		return;
	if (state == SLOT_PENDING)
		counters->dropped++;
	else
		counters->dropped_late++;
	*total += 1;
	report_drop(config, side, watchlist, counters, &arrival, scratch, &dead, reason,
		    state == SLOT_EGRESSED ? ifindex : 0);
}
