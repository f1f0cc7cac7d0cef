/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Per CPU memory of the programs: what would not fit the stack, or the verifier's patience if it were there. */
#pragma once
#include "maps.h"
#include "parse.h"

enum scratch_user {
	SCRATCH_TC = 0,	   /* deliver, too */
	SCRATCH_DROP = 1,  /* may be interrupted by the TC programs */
	SCRATCH_LOCAL = 2, /* local_in: the same */
	NR_SCRATCH = 3,
};

/* IP headers that were read from kernel memory. */
struct kernel_headers {
	__u64 seed;	/* of the fingerprint */
	__u32 payload;	/* offset of what follows them */
	__u32 l4_bytes; /* length of that, as the headers give it */
	bool later_fragment;
	bool unknown; /* more or longer extension headers than are read */
};

struct scratch {
	__u64 address; /* of the packet */
	__u64 busy;    /* the user's program is at work on this CPU */
	struct flow_key key;     /* the tuple as the packet carries it */
	struct flow_key arrived; /* as it came in */
	struct packet_offsets offsets;
	__u32 fingerprint;
	__u32 state;	  /* enum slot_state of a dropped packet's slot */
	__u32 translated; /* 1: the packet no longer carries the tuple that it came with */
	/* read from kernel memory: see skb.h */
	struct flow_key inner; /* inside a tunnel */
	struct kernel_headers headers;
	__u8 header[40] __attribute__((aligned(8)));
	__u8 transport[24] __attribute__((aligned(8)));
	/* classes, see classify.h */
	__u32 source;
	__u32 destination;
	__u32 destination_port;
	__u32 source_port;
};

PINNED_PERCPU_ARRAY(scratches, struct scratch, NR_SCRATCH);

static __always_inline struct scratch *scratch_of(__u32 user)
{
	return scratches.lookup(&user);
}
