# SPDX-License-Identifier: Apache-2.0
"""One packet that passes several of our hooks, or is passed on as a copy, is counted once and by what became of it."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from hostint_agent import bpf_types, classifier
from hostint_report import v05
from tests.lab import datapath as datapaths
from tests.lab import raw_packets, traffic
from tests.lab.topology import Lab

pytestmark = pytest.mark.lab
COUNT = 200
PORT = 4600
ETH_P_IP = 0x0800


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(nodes=1, pods=2, mode="routed") as built:
        yield built


@contextlib.contextmanager
def attached(lab: Lab, *interfaces: str) -> Iterator[datapaths.Datapath]:
    node = lab.nodes[0]
    with datapaths.loaded(node.namespace) as datapath:
        for interface in interfaces:
            datapath.attach(interface)
        datapath.attach_drop()
        datapath.attach_delivery()
        datapath.config.set_port_is_ifindex(True)
        report, port = bpf_types.RuleAction.REPORT, ((PORT, PORT),)
        datapath.watch([classifier.Rule(1, 1, report, protocol=17, destination_ports=port)])
        datapath.enable()
        yield datapath


def test_packet_through_a_stack_of_devices_is_counted_once(lab):
    """A macvlan above eth0, both with hooks: the first arrival stands."""
    node = lab.nodes[0]
    run = node.namespace.run
    run(*"ip link add mv0 link eth0 type macvlan mode bridge".split())
    run(*"ip addr add 10.99.0.77/24 dev mv0".split())
    run(*"ip link set mv0 up".split())
    # eth0 would answer for the address, which is the host's
    mac = raw_packets.mac(node.namespace, "mv0")
    lab.collector.run(*f"ip neigh replace 10.99.0.77 lladdr {mac} dev eth0 nud permanent".split())
    with attached(lab, "eth0", "mv0") as datapath:
        with traffic.udp_sink(node.namespace, "10.99.0.77", PORT):
            traffic.send_udp(lab.collector, "10.99.0.77", PORT, count=COUNT)
        identity = datapath.identity()
        reports = [v05.decode(data) for data in datapath.drain()]
        assert identity.watched_difference == 0
        assert identity.counters["watched"] == COUNT
        assert identity.counters["unresolved"] == identity.counters["unverified"] == 0
        assert {(r.ingress_port, r.egress_port) for r in reports} == {(node.port("eth0"), 0)}
        assert len(reports) == COUNT


def test_packet_that_a_packet_socket_refuses_is_no_drop(lab):
    """Bound to one protocol of one interface, it is given the packet itself, and what goes on is a clone."""
    node = lab.nodes[0]
    client, server = node.pods
    with node.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP)) as tap:
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        tap.bind((client.interface, ETH_P_IP))
        with attached(lab, client.interface, server.interface) as datapath:
            with traffic.udp_sink(server.namespace, server.address, PORT) as sink:
                traffic.send_udp(client.namespace, server.address, PORT, count=COUNT)
                received = [sink.recv(100) for _ in range(COUNT)]
            identity = datapath.identity()
            drops = [r for r in map(v05.decode, datapath.drain()) if isinstance(r, v05.DropReport)]
            assert len(received) == identity.counters["watched"] == COUNT
            assert (drops, identity.counters["dropped"], identity.counters["drops_not_asked"]) == (
                [],
                0,
                0,
            )
            assert identity.watched_difference == 0
