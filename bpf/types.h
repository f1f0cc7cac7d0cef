/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Every struct, enum and limit that the programs share with user space. agent/hostint_agent/bpf_types.py mirrors this
 * file and tests/agent/test_bpf_types.py proves that it does. Times are nanoseconds, of CLOCK_MONOTONIC unless the name
 * says wall; integers are host order unless the name ends in _be.
 */
#pragma once
#include <linux/types.h>

#define NR_SLOTS 65536
#define NR_FLOW_SETS 16384
#define FLOW_WAYS 4
#define MAX_WATCHLISTS 256 /* per node; index 0 is the agent's own Ignore rules */
#define MAX_COLLECTORS 16  /* per node */
#define REPORT_BYTES 192   /* room for one report: header and snapshot */
#define SNAP_BYTES 128     /* most of the inner packet that a report carries */
#define DROP_REASONS 512   /* index: low 8 bits of the reason, +256 for any subsystem but the core */
#define RINGS_PER_CPU 2
#define MAX_DROP_FUNCTIONS 256
#define FUNCTION_NAME_BYTES 56

/* The rings of a CPU, and the hw id each writes under. */
enum ring_kind {
	RING_FLOW = 0, /* hw id = CPU & 31 */
	RING_DROP = 1, /* hw id = 32 + (CPU & 31) */
};

enum report_event {
	EVENT_FLOW = 1,
	EVENT_DROP = 2,
	EVENT_QUEUE = 4,
};

enum report_format {
	FORMAT_V05 = 0,
};

enum rule_action {
	ACTION_NONE = 0, /* no such rule */
	ACTION_REPORT = 1,
	ACTION_IGNORE = 2,
};

/* The tuple of a packet. IPv4 addresses are in the first word, the rest zero. */
struct flow_key {
	__be32 source[4];
	__be32 destination[4];
	__u16 source_port;      /* host order; ICMP: 0 */
	__u16 destination_port; /* host order; ICMP: type << 8 | code */
	__u8 protocol;
	__u8 family; /* 4 or 6 */
	__u8 no_ports; /* 1: later fragment, truncated header, or more extension headers than we follow */
	__u8 generation; /* low bits of the classifier's that has judged the tuple: equal keys have the same verdict */
};

/* What the classifier says: 0 everywhere if no rule matched. */
struct verdict {
	__u32 rule_id;
	__u16 watchlist;
	__u16 action; /* enum rule_action */
};

enum slot_state {
	SLOT_FREE = 0,
	SLOT_TAKEN = 1,     /* a program is writing it */
	SLOT_PENDING = 2,   /* came in, outcome not seen yet */
	SLOT_DELIVERED = 3, /* taken by a socket of the host, or by the host; may still be dropped there */
	SLOT_EGRESSED = 4,  /* handed to the egress device, whose queue may still drop it, or to a pod's socket */
	SLOT_SENT = 5,	    /* the same, sent by the host itself */
	SLOT_REWRITTEN = 6, /* as EGRESSED, with neither address that it came with: NAT of both, or a tunnel */
};

/* The parts of slot.owner: enum slot_state, address of the packet, watchlist that counts it (0: none (yet)). */
#define OWNER_STATE 0x7ULL
#define OWNER_ADDRESS 0x00fffffffffffff8ULL
#define OWNER_WATCHLIST_SHIFT 56

/* One cache line, so that a packet touches one. */
struct slot {
	__u64 owner; /* see OWNER_STATE; 0: free */
	__u64 arrival_ns;
	__u32 ifindex;	     /* ingress interface; of SLOT_SENT: egress interface */
	__u32 fingerprint;   /* see fingerprint.h */
	struct flow_key key; /* as it came in, before NAT */
};

/* Report state of one flow, or of one flow and drop reason. */
struct flow {
	__u64 signature; /* hash of the tuple, 0: empty */
	__u64 reported_ns;
	__u32 latency_ns; /* as last reported, saturated */
	__u32 egress;     /* egress interface << 1, lowest bit: congested */
};

struct flow_set {
	struct flow way[FLOW_WAYS];
};

/* Report settings of one watchlist. Two-sided: index = side * MAX_WATCHLISTS + watchlist. */
struct policy {
	__u64 interval_ns;
	__u64 latency_change_ns;     /* 0: never report for that reason */
	__u64 congestion_latency_ns; /* 0: Q bit never set */
	__u32 sample;                /* 1 in N flows */
	__u16 events;                /* enum report_event, or-ed */
	__u16 collector;
};

/* Where reports go. Two-sided: index = side * MAX_COLLECTORS + collector. */
struct collector {
	__u32 reports_per_second; /* 0: no limit */
	__u16 snap_length;
	__u16 format; /* enum report_format */
};

/* Fixed-window rate limit of one collector, shared by all CPUs. */
struct rate_window {
	__u64 state; /* number of the window << RATE_USED_BITS | reports asked for in it */
};

#define RATE_USED_BITS 24

/* UDP ports of the tunnels that end on this host, in host order; 0: none. */
struct tunnel_ports {
	__u16 vxlan[3];
	__u16 geneve;
};

/* Settings that are not rules; one element. */
struct config {
	__u64 wall_offset_ns; /* CLOCK_REALTIME - CLOCK_MONOTONIC */
	__u64 netns_cookie;   /* of the namespace whose drops count */
	__u32 node_id;
	__u32 enabled; /* 0: both hooks return at once */
	struct tunnel_ports tunnels;
	/* byte offsets in kernel structs, from BTF; 0 where the kernel has no such member */
	__u32 skb_dev;
	__u32 skb_head;
	__u32 skb_data;
	__u32 skb_tail;
	__u32 skb_mac_header;
	__u32 skb_network_header;
	__u32 dev_ifindex;
	__u32 dev_net;
	__u32 dev_priv; /* what the driver keeps behind struct net_device */
	__u32 net_cookie;
	__u32 hold; /* 1: no reports yet, a datapath with other maps is still being replaced by this one */
	__u32 port_is_ifindex; /* 1: no interface has a port id other than its index, and nobody needs to look it up */
};

enum drop_flag {
	DROP_REPORT = 1,       /* a packet that dies for this reason before egress is reported */
	DROP_AFTER_EGRESS = 2, /* also when it has been handed to the egress device */
	DROP_QUEUE = 4,        /* a full queue: the Q bit is set as well */
	DROP_CHECK_TTL = 8,    /* a header error: code 26 instead when the TTL is used up */
	DROP_NOT_ECHO_REPLY = 16, /* no death of an echo reply: who asked has read a clone of it */
	DROP_NOT_GROUP = 32,   /* no death of a frame for a group: the others have theirs, this host is no member */
	DROP_OF_COPY = 64,     /* what dies for it is a packet socket's own copy */
	DROP_NOT_ABOVE_IP = 128, /* no drop of a packet that a transport protocol has got: see is_benign_free */
	DROP_BY_FUNCTION = 256, /* the reason does not say why: also counted by function */
};

/* Key of drop_functions. */
struct drop_site {
	__u64 location; /* in the kernel's code, of the call that freed the packet */
	__u32 reason;   /* index: see DROP_REASONS */
	__u32 pad;
};

/* Drops of one drop_site, per CPU. The CPU that saw the first one has the name, all others "". */
struct drop_function {
	__u64 count;
	char name[FUNCTION_NAME_BYTES]; /* as the kernel formats %pB: "ip_error+0x1d/0x2c0" */
};

/* What to do about one kernel drop reason; index: see DROP_REASONS. */
struct drop_reason {
	__u16 flags; /* enum drop_flag, or-ed */
	__u8 code;   /* INT drop reason */
	__u8 pad[5];
};

/* One slot of a ring: finished wire bytes. */
struct report_record {
	__u8 bytes[REPORT_BYTES];
};

/* struct iovec of the record with the same index: the agent writes base once, the program len. */
struct report_iov {
	__u64 base;
	__u64 len;
};

/* Ring position, alone in its cache line. head is written by the program, tail by the agent; both only grow. */
struct ring_position {
	__u64 value;
	__u64 asleep; /* of a tail, 1: the agent looks rarely, and wants the bell rung when there is a report */
	__u64 busy;   /* of a head, 1: a program that others may interrupt is writing a record */
	__u64 pad[5];
};

/* Kept by the exporter, per collector. */
struct export_counter {
	__u64 sent;
	__u64 failed;
};

/* Programs that count for watchlists; index into watchlist_counters: user * MAX_WATCHLISTS + watchlist. */
enum counter_user {
	COUNTERS_TC = 0,
	COUNTERS_DROP = 1,
	NR_COUNTER_USERS = 2,
};

/* Per watchlist, user and CPU. New ones come last: an upgrade carries those over that both versions have. */
struct watchlist_counters {
	__u64 watched;
	__u64 reported;
	__u64 suppressed;
	__u64 sampled_out;
	__u64 rate_limited;
	__u64 ring_full;
	__u64 unverified;
	__u64 unresolved;
	__u64 dropped;      /* died before any other outcome */
	__u64 dropped_late; /* died after it had been counted as forwarded or delivered */
	__u64 drops_reported;
	__u64 drops_suppressed;
	__u64 drops_sampled_out;
	__u64 drops_rate_limited;
	__u64 drops_ring_full;
	__u64 drops_not_asked;
	__u64 not_asked; /* forwarded, but the watchlist does not ask for flow or queue reports */
};

/* Index into datapath_counters, per CPU; each is counted by one kind of program. New ones come last, as above. */
enum datapath_counter {
	COUNT_NOT_IP = 0,          /* frames that are not IP */
	COUNT_TRUNCATED = 1,       /* IP packets whose headers could not be read */
	COUNT_FLOW_EVICTED = 2,    /* flows forgotten because their set was full: reported again when seen next */
	COUNT_SNAPSHOT_FAILED = 3, /* reports sent without the inner packet */
	COUNT_SLOT_BUSY = 4,       /* watched (or possible) packets without a slot: another CPU was taking it */
	COUNT_STALE_DROP = 5,      /* drops of packets that only had the address of a watched one */
	COUNT_DROP_EVICTED = 6,    /* as FLOW_EVICTED, for a drop */
	COUNT_DROP_SNAPSHOT_FAILED = 7,
	COUNT_DROP_NESTED = 8,     /* drops not looked at: during an upgrade, the other drop program was at work on that CPU */
	COUNT_DROP_FUNCTION_UNKNOWN = 9, /* drops without a place in drop_functions, or a name */
	NR_DATAPATH_COUNTERS = 10,
};
