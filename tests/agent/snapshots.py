# SPDX-License-Identifier: Apache-2.0
"""What an agent knows at one moment, of which metrics are made: each number is another, so that none is taken for another's."""

from hostint_agent import bpf_types, counters, metrics

WATCHLIST = {name: 1000 + i for i, name in enumerate(counters.WATCHLIST_FIELDS)}
DATAPATH = {c.name.lower(): 2000 + c for c in bpf_types.DatapathCounter}
NOW = metrics.Snapshot(
    version="1.2.3",
    watchlists={"web": WATCHLIST},
    datapath=DATAPATH,
    drops={"NO_SOCKET": 3000},
    drop_functions={"NOT_SPECIFIED": {"ip_error": 3011}},
    drop_recursion_misses=3001,
    exported={"default": (3002, 3003)},
    rings=[3004, 3005],
    attached=3006,
    not_attached=3007,
    hold=True,
    rules=3008,
    generation=3009,
    config_errors=3010,
)
