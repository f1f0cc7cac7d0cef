/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Counting, per CPU and without atomics: a counter has one kind of program that writes it. TC programs run with softirqs
 * off and never within each other; the tracepoint program may be interrupted by them, but not by itself.
 */
#pragma once
#include "maps.h"

static __always_inline void count(enum datapath_counter counter)
{
	__u32 index = counter;
	__u64 *value = datapath_counters.lookup(&index);

	if (value)
		*value += 1;
}

static __always_inline struct watchlist_counters *counters_of(enum counter_user user, __u32 watchlist)
{
	__u32 index = user * MAX_WATCHLISTS + (watchlist & (MAX_WATCHLISTS - 1));

	return watchlist_counters.lookup(&index);
}

/* Store a word that makes what was written before visible to other CPUs. */
static __always_inline void publish(__u64 *word, __u64 value)
{
#ifdef STORES_ARE_ORDERED
	barrier();
	WRITE_ONCE(*word, value);
#else
	__sync_lock_test_and_set(word, value);
#endif
}
