/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The addresses of the host itself. A small filter of bits spares nearly every packet the look into the hash. */
#pragma once
#include "maps.h"

#define LOCAL_FILTER_BITS (64 * NR_LOCAL_FILTER_WORDS)

/* agent/hostint_agent/local_addresses.py has the same function. */
static __always_inline __u32 local_filter_bit(const struct address *address)
{
	__u32 mixed = (address->word[0] ^ address->word[1] ^ address->word[2] ^ address->word[3]) * 0x9e3779b1U;

	return (mixed >> 16) & (LOCAL_FILTER_BITS - 1);
}

/* Whether a packet is for an address of the host. */
static __always_inline bool is_local_address(const struct flow_key *key)
{
	struct address address;
	__u32 bit, index;
	__u64 *word;

	__builtin_memcpy(&address, key->destination, sizeof(address));
	if (key->family == 4) {
		/* as an IPv4-mapped IPv6 address (RFC 4291, 2.5.5.2): the two families share the map */
		address.word[3] = address.word[0];
		address.word[2] = bpf_htonl(0xffff);
		address.word[0] = 0;
	}
	bit = local_filter_bit(&address);
	index = bit / 64;
	word = local_filter.lookup(&index);
	if (likely(!word || !((*word >> (bit & 63)) & 1)))
		return false;
	return local_addresses.lookup(&address) != NULL;
}
