/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The addresses of the host itself. A small filter of bits spares nearly every packet the look into the hash. */
#pragma once
#include "maps.h"

#define LOCAL_FILTER_BITS (64 * NR_LOCAL_FILTER_WORDS)

/* agent/hostint_agent/attach.py has the same function. */
static __always_inline __u32 local_filter_bit(const __be32 *address)
{
	__u32 mixed = (address[0] ^ address[1] ^ address[2] ^ address[3]) * 0x9e3779b1U;

	return (mixed >> 16) & (LOCAL_FILTER_BITS - 1);
}

static __always_inline bool is_local_address(const __be32 *address)
{
	__u32 bit = local_filter_bit(address), index = bit / 64;
	__u64 *word = local_filter.lookup(&index);
	struct address key;

	if (!word || !((*word >> (bit & 63)) & 1))
		return false;
	__builtin_memcpy(&key, address, sizeof(key));
	return local_addresses.lookup(&key) != NULL;
}
