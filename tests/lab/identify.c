// SPDX-License-Identifier: Apache-2.0
/* identity.h for the bytes in reports: a library that truth.py calls. */
#include <linux/types.h>
#include <stdint.h>
#include <string.h>

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif

struct packet {
	const __u8 *bytes;
	__u32 length;
};

static __always_inline int load(const struct packet *packet, __u32 at, void *to, __u32 bytes)
{
	if (at + bytes > packet->length)
		return -1;
	memcpy(to, packet->bytes + at, bytes);
	return 0;
}

#include "identity.h"

/* The packets of `count` reports, `stride` bytes apart, as their headers show them. */
void identify_reports(const __u8 *packets, const __u32 *lengths, long stride, long count, struct identity *shown)
{
	for (long i = 0; i < count; i++) {
		struct packet packet = {packets + i * stride, lengths[i]};
		struct inet inet = {};

		if (read_frame(&packet, 0, &shown[i], &inet) < 0)
			shown[i].protocol = 0;
	}
}
