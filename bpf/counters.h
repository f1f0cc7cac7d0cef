/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Counting, per CPU. What is counted per packet has one kind of program that writes it, and needs no atomics: TC programs
 * and deliver run with softirqs off and never within each other; they may interrupt the tracepoint program, which does not
 * interrupt itself. local_in counts with TC, and they may interrupt it where a process has given a packet back to the
 * kernel (NFQUEUE: nf_reinject), so its additions are atomic.
 */
#pragma once
#include "maps.h"

/* `interruptible`: a program that writes the same counter may interrupt this one, but not within an instruction. */
static __always_inline void add(__u64 *counter, __s64 change, bool interruptible)
{
	if (interruptible)
		__sync_fetch_and_add(counter, change);
	else
		*counter += change;
}

/* What is rare, by whichever program. */
static __always_inline void count(enum datapath_counter counter)
{
	__u32 index = counter;
	__u64 *value = datapath_counters.lookup(&index);

	if (value)
		add(value, 1, true);
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
