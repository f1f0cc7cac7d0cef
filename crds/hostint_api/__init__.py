# SPDX-License-Identifier: Apache-2.0
"""The API objects as frozen pydantic models, mirroring crds/*.yaml. Knows no other package of this project."""

from hostint_api.collector import CollectorSpec, RateLimit, ServiceRef
from hostint_api.node_config import (
    CollectorState,
    IgnoredDestination,
    NodeCollector,
    NodeConfigSpec,
    NodeConfigStatus,
    NodeRule,
    NodeWatchlist,
    WatchlistState,
)
from hostint_api.watchlist import (
    CollectorRef,
    NodeSelector,
    Peer,
    PortRange,
    ReportSettings,
    WatchlistRule,
    WatchlistSpec,
)

__all__ = [
    "CollectorRef",
    "CollectorSpec",
    "CollectorState",
    "IgnoredDestination",
    "NodeCollector",
    "NodeConfigSpec",
    "NodeConfigStatus",
    "NodeRule",
    "NodeSelector",
    "NodeWatchlist",
    "Peer",
    "PortRange",
    "RateLimit",
    "ReportSettings",
    "ServiceRef",
    "WatchlistRule",
    "WatchlistSpec",
    "WatchlistState",
]
