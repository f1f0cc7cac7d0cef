/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Every map but the classifier's (classify.h). All are pinned by name; MMAPABLE ones are read or written by the agent
 * through mmap. PINNED_ARRAY and its like are defined by the loader's prelude, which knows the pin directory.
 */
#pragma once
#include "types.h"

/*
 * An upgrade takes the maps over if all declarations of the sources are the same as before, and so whatever is outside of
 * functions. Raise this where the same bytes in a map come to mean something else.
 */
#define MAPS_VERSION 1

PINNED_MMAPABLE(config, struct config, 1);
PINNED_ARRAY(slots, struct slot, NR_SLOTS);
PINNED_ARRAY(flows, struct flow_set, NR_FLOW_SETS);
PINNED_MMAPABLE(policies, struct policy, 2 * MAX_WATCHLISTS);
PINNED_MMAPABLE(collectors, struct collector, 2 * MAX_COLLECTORS);
PINNED_ARRAY(rate_windows, struct rate_window, MAX_COLLECTORS);
PINNED_ARRAY(drop_reasons, struct drop_reason, DROP_REASONS);
/* ifindex -> 16-bit port id of the reports */
PINNED_HASH(ports, __u32, __u64, 8192);
/* sequence numbers: index = ring * MAX_COLLECTORS + collector, ring = CPU * RINGS_PER_CPU + kind */
PINNED_MMAPABLE(sequences, __u64, NR_RINGS * MAX_COLLECTORS);
/* the rings: index = ring * RING_RECORDS + (position & (RING_RECORDS - 1)) */
PINNED_MMAPABLE(report_records, struct report_record, NR_RECORDS);
PINNED_MMAPABLE(report_iovs, struct report_iov, NR_RECORDS);
PINNED_MMAPABLE(report_collectors, __u64, NR_RECORDS);
PINNED_MMAPABLE(ring_heads, struct ring_position, NR_RINGS);
PINNED_MMAPABLE(ring_tails, struct ring_position, NR_RINGS);
/* cookies of the agent's sending sockets: what they send is never watched */
PINNED_HASH(own_sockets, __u64, __u64, 256);
/* what the agent waits on while it is asleep; nothing in it is read */
PINNED_RINGBUF(bell, 1);
/* sent and failed reports per collector, kept by the exporter over its own restarts: {sent, failed} */
PINNED_MMAPABLE(export_counters, struct export_counter, MAX_COLLECTORS);
/* what datapaths that this one has replaced had counted; written by the agent only */
PINNED_ARRAY(carried_watchlist_counters, struct watchlist_counters, MAX_WATCHLISTS);
PINNED_ARRAY(carried_datapath_counters, __u64, NR_DATAPATH_COUNTERS);
PINNED_ARRAY(carried_drop_counters, __u64, DROP_REASONS);
PINNED_PERCPU_ARRAY(watchlist_counters, struct watchlist_counters, NR_COUNTER_USERS * MAX_WATCHLISTS);
PINNED_PERCPU_ARRAY(datapath_counters, __u64, NR_DATAPATH_COUNTERS);
PINNED_PERCPU_ARRAY(drop_counters, __u64, DROP_REASONS);
/* Drops whose reason does not say why, by the function that dropped the packet. */
PINNED_PERCPU_HASH(drop_functions, struct drop_site, struct drop_function, MAX_DROP_FUNCTIONS);
/* For bpf_snprintf, whose format must be in memory that nothing can change. */
PINNED_CONSTANT(symbol_format, "%pB");
