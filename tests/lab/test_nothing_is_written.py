# SPDX-License-Identifier: Apache-2.0
"""A CNI that decides by every bit of a packet's metadata decides the same with our programs and without them.

That no field differs before and after our programs, on packets of every shape, is in tests/datapath/test_real_packets.py.
"""

import ipaddress
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hostint_agent import bpf_calls, bpf_types, classifier, loader
from tests.lab import compiled, traffic
from tests.lab import datapath as datapaths
from tests.lab.topology import Lab
from tests.pins import pin_directory

pytestmark = pytest.mark.lab
PACKETS = 100_000
PORT = 4700
HOOKS = {"ingress": bpf_calls.TCX_INGRESS, "egress": bpf_calls.TCX_EGRESS}
PROGRAMS = tuple(f"{what}_{hook}" for hook in HOOKS for what in ("noise", "decide"))
IGNORE, REPORT = bpf_types.RuleAction.IGNORE, bpf_types.RuleAction.REPORT
_NOWHERE = (ipaddress.ip_network("203.0.113.1/32"),)
# rules that make every packet of the test one of these
KINDS = {
    "watched": classifier.Rule(1, 1, REPORT),
    "possible": classifier.Rule(1, 1, REPORT, destinations=_NOWHERE),
    "ignored": classifier.Rule(1, 0, IGNORE),
    "unwatched": classifier.Rule(1, 1, REPORT, sources=_NOWHERE, destinations=_NOWHERE),
}


class Cni:
    """The stand-in, pinned; `decisions` are its map, by hook and number of the packet."""

    def __init__(self, pins: Path) -> None:
        self._pins = pins
        sizes = {
            "NR_DECISIONS": PACKETS,
            "WATCHED_PORT": PORT,
            "PAYLOAD_TAG_BYTES": len(traffic.PAYLOAD_TAG),
        }
        compiled.bpf(Path(__file__).with_name("reading_cni.c"), pins, PROGRAMS, sizes)
        opened = bpf_calls.Map.open(pins / "cni_decisions")
        self._memory = np.frombuffer(opened.memory(), "u4")
        self._stride = opened.stride // 4
        opened.close()

    def program(self, name: str) -> int:
        return bpf_calls.obj_get(self._pins / name)

    def take(self) -> np.ndarray:
        """The decisions since the last time, one row a hook; 0: the packet did not come."""
        taken = self._memory[:: self._stride][: 2 * PACKETS].reshape(2, PACKETS).copy()
        self._memory[:] = 0
        return taken


@pytest.fixture(scope="module")
def cni() -> Iterator[Cni]:
    with pin_directory("reading-cni") as pins:
        yield Cni(pins)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=1, pods=2, mode="routed") as built:
        yield built


def decided(lab: Lab, cni: Cni, rule: classifier.Rule | None, bpf_dir: Path | None = None):
    """What the CNI decides on all packets; with `rule` our programs run between its two."""
    node = lab.nodes[0]
    client, server = node.pods
    cni.take()
    with datapaths.loaded(node.namespace, bpf_dir) as datapath:
        if rule:
            datapath.watch([rule])
            datapath.enable()
        for pod, hook in ((client, "ingress"), (server, "egress")):
            index = node.port(pod.interface)
            programs = [cni.program(f"decide_{hook}"), cni.program(f"noise_{hook}")]
            if rule:
                programs.insert(1, datapath.program(hook))
            # each goes before those that are there
            for program in programs:
                datapath.attach_program(program, index, HOOKS[hook])
        with traffic.udp_sink(server.namespace, server.address, PORT):
            traffic.send_udp(client.namespace, server.address, PORT, count=PACKETS)
        watched = datapath.identity().counters["watched"]
    return cni.take(), watched


@pytest.fixture(scope="module")
def without_us(lab, cni):
    decisions, _ = decided(lab, cni, None)
    passed = decisions[0] & 1
    assert (decisions[0] > 0).all()
    assert PACKETS * 0.7 < passed.sum() < PACKETS * 0.8
    assert (decisions[1] > 0).sum() == passed.sum()
    return decisions


@pytest.mark.parametrize("kind", KINDS)
def test_cni_decides_the_same_with_us(lab, cni, without_us, kind):
    decisions, watched = decided(lab, cni, KINDS[kind])
    assert (decisions == without_us).all()
    assert (watched > 0) == (kind == "watched")


@pytest.mark.parametrize(
    "write",
    [
        "skb->tc_index ^= 1;",
        "skb->mark ^= 0x80000000;",
        "skb->priority ^= 1;",
        "skb->cb[4] ^= 1;",
        "skb->queue_mapping = 3;",
        "skb->tstamp += 1;",
        "bpf_get_hash_recalc(skb); bpf_set_hash(skb, 1);",
    ],
)
def test_cni_decides_otherwise_if_a_bit_is_written(lab, cni, without_us, tmp_path, write):
    """So the test above can fail."""
    sources = Path(shutil.copytree(loader.default_bpf_dir(), tmp_path / "bpf"))
    text = (sources / "int_host.c").read_text()
    here = "\taddress = packet_address(skb, scratch);\n"
    assert text.count(here) == 2
    (sources / "int_host.c").write_text(text.replace(here, f"\t{write}\n{here}"))
    decisions, _ = decided(lab, cni, KINDS["watched"], sources)
    assert (decisions[0] != without_us[0]).sum() > PACKETS * 0.9


def test_sources_assign_to_no_field_of_a_packet():
    """Neither on the hooks above nor where sockets take packets or the kernel drops them."""
    writers = re.compile(
        r"\bskb->\w+(\[\w+\])?\s*([-+|&^]|<<|>>)?=[^=]"
        r"|bpf_(skb_(store|change|adjust|set|pull)|set_hash|l[34]_csum|clone_redirect|redirect)"
    )
    for path in sorted(loader.default_bpf_dir().glob("*.[ch]")):
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        # a struct of ours of that name is in skb.h: what it is read into
        lines = [line for line in text.splitlines() if "READ_FIELD(" not in line]
        assert not writers.search("\n".join(lines)), path.name
