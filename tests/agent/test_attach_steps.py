# SPDX-License-Identifier: Apache-2.0
"""A step that fails while interfaces are looked at stops no other, is reported and is retried."""

import dataclasses
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from hostint_agent import attach, bpf_calls, clsact, interfaces, kernel, loader, netlink, settings
from tests.agent import node_shapes
from tests.agent.cable import cable
from tests.agent.test_interfaces import MALFORMED_ADDRESSES, MALFORMED_LINKS, OTHER_FAMILIES
from tests.lab.namespace import Namespace, ip

pytestmark = pytest.mark.bpf
CGROUP_ROOT = Path(settings.DEFAULT_CGROUP_ROOT)


@pytest.fixture(scope="module")
def pins() -> Iterator[Path]:
    directory = Path(f"/sys/fs/bpf/hostint-steps-{time.monotonic_ns()}")
    directory.mkdir()
    try:
        loader.load(directory)
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def ends() -> Iterator[tuple[Namespace, Namespace]]:
    with cable() as both:
        yield both


@pytest.fixture
def near(ends) -> Namespace:
    return ends[0]


@pytest.fixture
def attacher(near, pins) -> Iterator[attach.Attacher]:
    def make() -> attach.Attacher:
        return attach.Attacher(
            pins,
            loader.current(pins),
            patterns=interfaces.Patterns(),
            mode="tcx",
            cgroup=CGROUP_ROOT,
            on_change=print,
        )

    made = near.inside(make)
    yield made
    made.stop()
    shutil.rmtree(pins / "links", ignore_errors=True)


def is_attached(near: Namespace, pins: Path, name: str) -> bool:
    """Return True if our programs run first on both hooks of an interface."""

    def first() -> list[int]:
        index = socket.if_nametoindex(name)
        return [bpf_calls.TcxHead(index, kind).program_id() for kind in bpf_calls.TCX_TYPE.values()]

    ours = []
    for hook in bpf_calls.TCX_TYPE:
        with bpf_calls.opened(loader.current(pins) / "programs" / hook) as fd:
            ours.append(bpf_calls.program_id(fd))
    return near.inside(first) == ours


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


STEPS = {
    "pins": (attach.pin_keeper.PinKeeper, "restore"),
    "drop program": (attach.DropLink, "ensure"),
    "tunnel ports": (kernel.DatapathConfig, "set_tunnels"),
    "older attachments": (attach.TcxHooks, "keep_only"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [OSError(7, "Argument list too long"), KeyError(3)], ids=type)
def test_a_step_that_fails_stops_no_other(near, pins, attacher, monkeypatch, step, error):
    (pins / "links").mkdir(exist_ok=True)
    where, name = STEPS[step]
    monkeypatch.setattr(where, name, failing(error))
    near.inside(attacher.start)
    assert attacher.state().failures == {step: str(error)}
    assert attacher.state().failed == ()
    assert is_attached(near, pins, "eth0")
    assert attacher.state().drops_unseen == (step == "drop program")
    assert attacher._next_look < time.monotonic() + 1
    monkeypatch.undo()
    eventually(lambda: not attacher.state().failures)
    assert attacher.alive


def test_only_a_pod_without_a_port_id_is_not_attached(ends, pins, attacher, monkeypatch):
    """As on a node with more interfaces than the map has room for."""
    near, far = ends
    near.inside(attacher.start)
    monkeypatch.setattr(bpf_calls.Map, "update", failing(OSError(7, "Argument list too long")))
    ip(f"-n {near.name} link add pod9 type veth peer name pod9 netns {far.name}")
    eventually(lambda: bool(attacher.state().failed))
    (failed,) = attacher.state().failed
    assert failed.interface.name == "pod9"
    assert failed.error == "no port id: [Errno 7] Argument list too long"
    assert is_attached(near, pins, "eth0")
    assert not is_attached(near, pins, "pod9")
    monkeypatch.undo()
    eventually(lambda: not attacher.state().failed)
    assert is_attached(near, pins, "pod9")


def test_interfaces_that_cannot_be_read_stay_attached(near, pins, attacher, monkeypatch):
    near.inside(attacher.start)
    monkeypatch.setattr(
        interfaces, "read_network", failing(OSError(105, "No buffer space available"))
    )
    for pin in (pins / "links").iterdir():
        pin.unlink()
    eventually(lambda: attacher.state().error is not None)
    eventually(lambda: is_attached(near, pins, "eth0"))
    assert (pins / "links" / attach.DROP_TRACEPOINT).exists()
    assert [a.interface.name for a in attacher.state().attachments] == ["eth0"]
    monkeypatch.undo()
    eventually(lambda: attacher.state().error is None)


@pytest.mark.parametrize(
    "more",
    [
        *(
            {"more_addresses": [body]}
            for body in (*OTHER_FAMILIES.values(), *MALFORMED_ADDRESSES.values())
        )
    ]
    + [{"more_links": [body]} for body in MALFORMED_LINKS.values()],
    ids=[*OTHER_FAMILIES, *MALFORMED_ADDRESSES, *MALFORMED_LINKS],
)
def test_messages_of_others_keep_no_interface_unattached(near, pins, attacher, more):
    """A node with an address of MCTP had no agent."""
    index = near.inside(lambda: socket.if_nametoindex("eth0"))
    shape = node_shapes.Shape([node_shapes.LO, node_shapes.pod(index, "eth0")], [])
    with node_shapes.answering(dataclasses.replace(shape, **more)):
        near.inside(attacher.start)
        assert attacher.alive
        assert attacher.state().error is None
        assert is_attached(near, pins, "eth0")


@pytest.mark.parametrize("mode", ["tcx", "clsact"])
def test_a_device_that_goes_before_it_is_attached_is_no_failure(near, pins, mode):
    """Pods end at any moment; a status that says so would be written for each."""
    index = near.inside(lambda: socket.if_nametoindex("eth0"))
    devices = [node_shapes.pod(index, "eth0"), node_shapes.pod(9999, "pod0")]
    network = node_shapes.read(node_shapes.Shape(devices, []))

    def make() -> attach.Attacher:
        return attach.Attacher(
            pins,
            loader.current(pins),
            patterns=interfaces.Patterns(),
            mode=mode,
            cgroup=CGROUP_ROOT,
            on_change=print,
        )

    made = near.inside(make)
    with mock.patch.object(interfaces, "read_network", lambda: network):
        near.inside(made.start)
    try:
        assert [a.interface.name for a in made.state().attachments] == ["eth0"]
        assert (made.state().failed, made.state().failures) == ((), {})
    finally:
        made.stop()
        shutil.rmtree(pins / "links")


def test_a_filter_that_is_gone_with_its_device_is_removed(near):
    def remove(index: int) -> None:
        with netlink.Socket() as route:
            clsact._delete(route, index, "ingress")

    near.inside(lambda: remove(9999))
    near.inside(lambda: remove(socket.if_nametoindex("eth0")))


def test_a_link_that_somebody_unpins_meanwhile_is_unpinned(near, pins, attacher):
    near.inside(attacher.start)
    hooks = attacher._tcx
    ghost = pins / "links" / "tcx-9999-ingress"
    with mock.patch.object(Path, "iterdir", lambda _: iter([ghost])):
        hooks.keep_only(frozenset())
        assert hooks.detach_others() == []


def test_a_look_that_waits_costs_no_time(near, attacher, monkeypatch):
    """The kernel takes milliseconds for a link, in which the agent does nothing."""
    read = interfaces.read_network

    def slow() -> interfaces.Network:
        time.sleep(0.6)
        return read()

    monkeypatch.setattr(interfaces, "read_network", slow)
    near.inside(attacher.reconcile)
    assert attacher._pace.gather_s() < 0.2
