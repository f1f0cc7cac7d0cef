# SPDX-License-Identifier: Apache-2.0
"""Names that objects, manifests and programs share: group, kinds, condition types, labels, field managers."""

GROUP = "hostint.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
NAMESPACE = "hostint-system"

WATCHLIST_KIND = "IntWatchlist"
COLLECTOR_KIND = "IntCollector"
NODE_CONFIG_KIND = "IntNodeConfig"
WATCHLISTS = "intwatchlists"
COLLECTORS = "intcollectors"
NODE_CONFIGS = "intnodeconfigs"

DEFAULT_COLLECTOR = "default"
DEFAULT_PORT = 32766

AGENT_LABEL = "app.kubernetes.io/name"
AGENT_NAME = "hostint-agent"

# one manager per writing place: two places that share one undo each other's fields
OPERATOR_MANAGER = "hostint-operator"
OPERATOR_STATUS_MANAGER = "hostint-operator-status"
AGENT_MANAGER = "hostint-agent"

ACCEPTED = "Accepted"
READY = "Ready"
RECONCILING = "Reconciling"
STALLED = "Stalled"
COLLECTOR_REACHABLE = "CollectorReachable"
