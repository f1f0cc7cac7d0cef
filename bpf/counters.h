/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Counting. Per CPU, and atomic only where a tracepoint program could be interrupted by a TC program on its CPU. */
#pragma once
#include "maps.h"

static __always_inline void count(enum datapath_counter counter)
{
	__u32 index = counter;
	__u64 *value = datapath_counters.lookup(&index);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline struct watchlist_counters *counters_of(__u32 watchlist)
{
	return watchlist_counters.lookup(&watchlist);
}
