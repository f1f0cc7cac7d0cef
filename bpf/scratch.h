/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Per CPU memory of the programs: what would not fit the stack, or the verifier's patience if it were there. */
#pragma once
#include "maps.h"
#include "parse.h"

enum scratch_user {
	SCRATCH_TC = 0,
	SCRATCH_DROP = 1, /* may be interrupted by the TC programs */
	NR_SCRATCH = 2,
};

struct scratch {
	__u64 address; /* of the packet */
	__u64 busy;    /* the user's program is at work on this CPU */
	struct flow_key key;     /* the tuple as the packet carries it */
	struct flow_key arrived; /* as it came in */
	struct packet_offsets offsets;
	__u32 translated; /* 1: a dead packet no longer carries the tuple that it came with */
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
