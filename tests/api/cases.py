# SPDX-License-Identifier: Apache-2.0
"""Objects that must be refused: what is wrong, where, and in which words; by the models and by the API server alike."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refused:
    """A spec, the place the message must name, and words it must have."""

    kind: str
    spec: dict[str, Any]
    place: str
    words: str


def watchlist(rule: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"rules": [{"name": "web"} | (rule or {})], **more}


def _peer(*cidrs: str) -> dict[str, Any]:
    return {"cidrs": list(cidrs)}


RULE = "spec.rules[0]"
REFUSED = {
    "bad-cidr": Refused(
        "IntWatchlist",
        watchlist({"source": _peer("10.0.0.0")}),
        f"{RULE}.source.cidrs[0]",
        "must be an IPv4 or IPv6 CIDR such as 10.0.0.0/8 or fd00::/8",
    ),
    "host-bits": Refused(
        "IntWatchlist",
        watchlist({"destination": _peer("10.0.0.1/8")}),
        f"{RULE}.destination.cidrs[0]",
        "host bits must be zero (10.0.0.0/8, not 10.0.0.1/8)",
    ),
    "families-differ": Refused(
        "IntWatchlist",
        watchlist({"source": _peer("10.0.0.0/8"), "destination": _peer("fd00::/8")}),
        RULE,
        "source and destination must have an IP family in common",
    ),
    "port-without-protocol": Refused(
        "IntWatchlist",
        watchlist({"destination": {"ports": [{"port": 80}]}}),
        RULE,
        "ports need protocol TCP, UDP or SCTP",
    ),
    "port-with-icmp": Refused(
        "IntWatchlist",
        watchlist({"protocol": "ICMP", "source": {"ports": [{"port": 80}]}}),
        RULE,
        "ports need protocol TCP, UDP or SCTP",
    ),
    "end-port-before-port": Refused(
        "IntWatchlist",
        watchlist({"protocol": "TCP", "source": {"ports": [{"port": 80, "endPort": 79}]}}),
        f"{RULE}.source.ports[0]",
        "endPort must not be smaller than port",
    ),
    "port-too-large": Refused(
        "IntWatchlist",
        watchlist({"protocol": "TCP", "source": {"ports": [{"port": 65536}]}}),
        f"{RULE}.source.ports[0].port",
        "65535",
    ),
    "duplicate-rule-name": Refused(
        "IntWatchlist", {"rules": [{"name": "web"}, {"name": "web"}]}, "spec.rules", "web"
    ),
    "unknown-field": Refused(
        "IntWatchlist", watchlist({"sourcePort": 80}), f"{RULE}.sourcePort", "unknown field"
    ),
    "unknown-protocol": Refused(
        "IntWatchlist", watchlist({"protocol": "GRE"}), f"{RULE}.protocol", "Unsupported value"
    ),
    "rule-name": Refused(
        "IntWatchlist", watchlist({"name": "Web_1"}), f"{RULE}.name", "Invalid value"
    ),
    "no-rules": Refused("IntWatchlist", {"rules": []}, "spec.rules", "at least 1 items"),
    "too-many-rules": Refused(
        "IntWatchlist",
        {"rules": [{"name": f"r{n}"} for n in range(257)]},
        "spec.rules",
        "at most 256 items",
    ),
    "interval-too-short": Refused(
        "IntWatchlist",
        watchlist(report={"interval": "1ms"}),
        "spec.report.interval",
        "at least 10ms",
    ),
    "interval-too-long": Refused(
        "IntWatchlist", watchlist(report={"interval": "61m"}), "spec.report.interval", "at most 1h"
    ),
    "latency-change-too-long": Refused(
        "IntWatchlist",
        watchlist(report={"latencyChange": "3601s"}),
        "spec.report.latencyChange",
        "at most 1h",
    ),
    "congestion-latency-too-long": Refused(
        "IntWatchlist",
        watchlist(report={"congestionLatency": "2h"}),
        "spec.report.congestionLatency",
        "at most 1h",
    ),
    "interval-without-unit": Refused(
        "IntWatchlist",
        watchlist(report={"interval": "10"}),
        "spec.report.interval",
        "Invalid value",
    ),
    "sample-zero": Refused(
        "IntWatchlist", watchlist(report={"sample": 0}), "spec.report.sample", "1"
    ),
    "event-twice": Refused(
        "IntWatchlist", watchlist(report={"events": ["Flow", "Flow"]}), "spec.report.events", "Flow"
    ),
    "priority": Refused("IntWatchlist", watchlist(priority=1001), "spec.priority", "1000"),
    "two-destinations": Refused(
        "IntCollector",
        {"address": "192.0.2.1", "service": {"namespace": "a", "name": "b"}},
        "spec",
        "exactly one of address and service must be set",
    ),
    "no-destination": Refused(
        "IntCollector", {}, "spec", "exactly one of address and service must be set"
    ),
    "port-beside-service": Refused(
        "IntCollector",
        {"port": 1, "service": {"namespace": "a", "name": "b"}},
        "spec",
        "port goes with address",
    ),
    "address-of-other-characters": Refused(
        "IntCollector", {"address": "a b"}, "spec.address", "Invalid value"
    ),
    "unknown-format": Refused(
        "IntCollector",
        {"address": "192.0.2.1", "format": "TelemetryReportV09"},
        "spec.format",
        "Unsupported value",
    ),
    "snap-length": Refused(
        "IntCollector", {"address": "192.0.2.1", "snapLength": 33}, "spec.snapLength", "34"
    ),
    "dscp": Refused("IntCollector", {"address": "192.0.2.1", "dscp": 64}, "spec.dscp", "63"),
}
ACCEPTED = {
    "any-to-any": ("IntWatchlist", {"rules": [{"name": "all"}]}),
    "all-fields": (
        "IntWatchlist",
        {
            "collectorRef": {"name": "default"},
            "nodeSelector": {"matchLabels": {"pool": "edge"}},
            "priority": -5,
            "rules": [
                {
                    "name": "web",
                    "action": "Report",
                    "protocol": "SCTP",
                    "source": {
                        "cidrs": ["10.0.0.0/8", "fd00::/8"],
                        "ports": [{"port": 1, "endPort": 9}],
                    },
                    "destination": {"cidrs": ["0.0.0.0/0", "::/0"], "ports": [{"port": 65535}]},
                    "bidirectional": True,
                }
            ],
            "report": {
                "events": ["Queue", "Drop", "Flow"],
                "interval": "10ms",
                "latencyChange": "0s",
                "congestionLatency": "1h",
                "sample": 1000000,
            },
        },
    ),
    "ipv6-to-any-address": (
        "IntWatchlist",
        watchlist(
            {
                "protocol": "TCP",
                "source": _peer("fd00::/8"),
                "destination": {"ports": [{"port": 80}]},
            }
        ),
    ),
    "collector-by-name": ("IntCollector", {"address": "collector.example.net"}),
    "collector-by-ipv6": ("IntCollector", {"address": "2001:db8::1", "port": 1, "dscp": 63}),
    "collector-by-service": (
        "IntCollector",
        {"service": {"namespace": "a", "name": "b"}, "rateLimit": {"reportsPerSecond": 10}},
    ),
}
