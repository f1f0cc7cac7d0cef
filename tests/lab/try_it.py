# SPDX-License-Identifier: Apache-2.0
"""`make try`: one node and its pods as network namespaces, the real agent, real traffic, and the reports as they arrive."""

import os
import sys
import time
from collections.abc import Callable, Sequence

from hostint_collector import show
from hostint_collector.embedded import CollectorThread
from hostint_collector.record import Record
from tests.lab import traffic
from tests.lab.agent import LabAgent
from tests.lab.topology import Lab

OBJECTS = """
apiVersion: hostint.dev/v1alpha1
kind: IntCollector
metadata: {{name: default}}
spec: {{address: {address}, port: {port}}}
---
apiVersion: hostint.dev/v1alpha1
kind: IntWatchlist
metadata: {{name: pods}}
spec:
  rules:
  - name: pods
    source: {{cidrs: [10.244.0.0/16, 'fd44::/16']}}
    bidirectional: true
  report: {{interval: 10s, latencyChange: 10ms, congestionLatency: 5ms, events: [Flow, Drop, Queue]}}
"""
_WAIT_S = 5.0


class Story:
    """Tells what is done, shows what is reported, and remembers what did not come."""

    def __init__(self, collector: CollectorThread) -> None:
        self._collector = collector
        self._shown = 0
        self._coloured = show.use_colour(sys.stdout)
        self.told: list[tuple[str, Record]] = []
        self.missing: list[str] = []

    def say(self, text: str) -> None:
        """One line of narration."""
        self.flush()
        bold = f"\x1b[1m{text}\x1b[0m" if self._coloured else text
        print(f"\n{bold}", flush=True)

    def flush(self) -> None:
        """Show the reports that came since."""
        records = self._collector.records()
        for record in records[self._shown :]:
            print("  " + show.table_line(record, self._coloured), flush=True)
        self._shown = len(records)

    def expect(self, what: str, wanted: Callable[[Record], bool]) -> None:
        """Wait for a report, showing all that come."""
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            self.flush()
            found = next((r for r in self._collector.records() if wanted(r)), None)
            if found:
                self.told.append((what, found))
                return
            time.sleep(0.02)
        self.missing.append(what)
        print(f"  nothing came that is: {what}", flush=True)


def _flow(protocol: str, **inner: object) -> Callable[[Record], bool]:
    return lambda r: r["kind"] == "flow" and _has(r, protocol=protocol, **inner)


def _drop(name: str, **inner: object) -> Callable[[Record], bool]:
    return lambda r: r["kind"] == "drop" and r["dropReasonName"] == name and _has(r, **inner)


def _has(record: Record, **inner: object) -> bool:
    return all(record["inner"][key] == value for key, value in inner.items())


def play(lab: Lab, story: Story) -> None:
    """What works, then what goes wrong."""
    node = lab.nodes[0]
    client, web = node.pods
    story.say("A client asks a web server, over IPv4 and IPv6:")
    for version in (4, 6):
        with traffic.tcp_echo(web.namespace, web.ip(version), 80):
            traffic.tcp_exchange(client.namespace, web.ip(version), 80, b"GET / HTTP/1.1\r\n\r\n")
            story.expect(
                f"the request, IPv{version}", _flow("TCP", destinationAddress=web.ip(version))
            )
            story.expect(f"the answer, IPv{version}", _flow("TCP", sourceAddress=web.ip(version)))
    story.say("A ping, and a datagram:")
    traffic.ping(client.namespace, web.address)
    story.expect("the echo request", _flow("ICMP", icmpType=8))
    with traffic.udp_sink(web.namespace, web.address, 5353):
        traffic.send_udp(client.namespace, web.address, 5353)
        story.expect("the datagram", _flow("UDP", destinationPort=5353))
    story.say("A firewall rule drops port 4007:")
    host = node.namespace
    host.run("nft", "add", "table", "inet", "trouble")
    host.run("nft", "add chain inet trouble forward { type filter hook forward priority 0; }")
    host.run("nft", "add rule inet trouble forward udp dport 4007 drop")
    traffic.send_udp(client.namespace, web.address, 4007)
    story.expect("what the firewall dropped", _drop("denied by policy", destinationPort=4007))
    story.say("A black-hole route, and an address that no route leads to:")
    host.run("ip", "route", "add", "blackhole", "10.66.0.0/16")
    traffic.send_udp(client.namespace, "10.66.0.1", 4008)
    story.expect("what the black hole took", _drop("unknown", destinationAddress="10.66.0.1"))
    traffic.send_udp(client.namespace, "10.200.0.1", 4009)
    story.expect("what had no route", _drop("no route", destinationAddress="10.200.0.1"))
    story.say("A packet at the end of its TTL:")
    traffic.send_udp(client.namespace, web.address, 4010, ttl=1)
    story.expect("whose TTL was used up", _drop("TTL expired", destinationPort=4010))
    story.say("A link that is too slow (tbf), from the pod's side a burst:")
    shaper = "tc qdisc replace dev pod1 root tbf rate 64kbit burst 2000 limit 3000".split()
    host.run(*shaper)
    traffic.send_udp(client.namespace, web.address, 4011, count=200)
    story.expect("what its queue had no room for", _drop("queue full", destinationPort=4011))
    story.flush()


def summary(story: Story, agent: LabAgent) -> None:
    """The last lines: what was reported and what was dropped and why."""
    print("\nReported:")
    for what, record in story.told:
        if record["kind"] == "flow":
            print(
                f"  {what}: {show.flow(record['inner'])}, {show.latency(record['hopLatency'])} in the node"
            )
    print("Dropped:")
    for what, record in story.told:
        if record["kind"] == "drop":
            reason = f"{record['dropReasonName']} ({record['dropReason']})"
            print(f"  {what}: {show.flow(record['inner'])}: {reason}")
    found = agent.settled("pods")
    c = found.counters
    print(
        f"Accounted for: {c['watched']} packets watched = {c['reported']} reported + {c['suppressed']} without news "
        f"+ {c['dropped']} dropped + {c['unresolved'] + found.pending} that ended inside the host "
        f"+ {c['unverified']} that could not be followed beyond doubt"
    )


def main(arguments: Sequence[str] = ()) -> int:
    """Entry point: 0 if everything expected was reported."""
    del arguments
    if os.geteuid() != 0:
        print(
            "make try: needs root: it makes network namespaces and loads programs", file=sys.stderr
        )
        return 1
    started = time.monotonic()
    print(
        "One node and two pods as network namespaces; the agent compiles and attaches its programs ...",
        flush=True,
    )
    try:
        with Lab(nodes=1) as lab:
            collector = lab.collector.inside(lambda: CollectorThread(lab.collector_address))
            lab.on_exit(collector.stop)
            objects = OBJECTS.format(address=lab.collector_address, port=collector.port)
            with LabAgent(lab, lab.nodes[0], objects) as agent:
                print(f"ready after {time.monotonic() - started:.1f} s; reports as they arrive:\n")
                print("  " + show.HEADER)
                story = Story(collector)
                play(lab, story)
                summary(story, agent)
    except KeyboardInterrupt:
        print("\nstopped; namespaces and programs are gone")
        return 130
    if story.missing:
        print(f"\nNot reported: {', '.join(story.missing)}", file=sys.stderr)
        return 1
    print(f"\nEverything expected was reported, in {time.monotonic() - started:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
