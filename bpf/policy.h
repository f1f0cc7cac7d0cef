/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Report settings and destinations, of the side that classified the packet: one flip covers them all. */
#pragma once
#include "maps.h"

static __always_inline const struct policy *policy_of(__u32 side, __u32 watchlist)
{
	__u32 index = side * MAX_WATCHLISTS + (watchlist & (MAX_WATCHLISTS - 1));

	return policies.lookup(&index);
}

static __always_inline const struct collector *collector_of(__u32 side, __u32 collector)
{
	__u32 index = side * MAX_COLLECTORS + (collector & (MAX_COLLECTORS - 1));

	return collectors.lookup(&index);
}
