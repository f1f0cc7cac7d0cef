# SPDX-License-Identifier: Apache-2.0
"""A step that fails while interfaces are looked at stops no other, is reported and is retried."""

import dataclasses
import errno
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from hostint_agent import (
    attach,
    bpf_calls,
    clsact,
    delivery,
    interfaces,
    kernel,
    loader,
    netlink,
    settings,
)
from tests.agent import node_shapes
from tests.agent.cable import cable
from tests.agent.test_interfaces import MALFORMED_ADDRESSES, MALFORMED_LINKS, OTHER_FAMILIES
from tests.lab import cni
from tests.lab.namespace import Namespace, ip
from tests.pins import pin_directory

pytestmark = pytest.mark.bpf
CGROUP_ROOT = Path(settings.DEFAULT_CGROUP_ROOT)


@pytest.fixture(scope="module")
def pins() -> Iterator[Path]:
    with pin_directory("steps") as directory:
        loader.load(directory)
        yield directory


@pytest.fixture
def ends() -> Iterator[tuple[Namespace, Namespace]]:
    with cable() as both:
        yield both


@pytest.fixture
def near(ends) -> Namespace:
    return ends[0]


def attacher_of(
    pins: Path, mode: attach.Mode = "tcx", cgroup: Path = CGROUP_ROOT
) -> attach.Attacher:
    """An attacher for the namespace of the calling thread."""
    return attach.Attacher(
        pins,
        loader.current(pins),
        patterns=interfaces.Patterns(),
        mode=mode,
        cgroup=cgroup,
        on_change=print,
    )


@pytest.fixture
def attacher(near, pins) -> Iterator[attach.Attacher]:
    made = near.inside(lambda: attacher_of(pins))
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
    "delivery to sockets": (delivery.DeliveryLinks, "ensure_sockets"),
    **{
        f"delivery to the host, {name}": (delivery.DeliveryLinks, "ensure_host")
        for name in delivery.HOST
    },
    "tunnel ports": (kernel.DatapathConfig, "set_tunnels"),
    "older attachments": (attach.TcxHooks, "keep_only"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [OSError(7, "Argument list too long"), KeyError(3)], ids=type)
def test_a_step_that_fails_stops_no_other(near, pins, attacher, monkeypatch, step, error):
    (pins / "links").mkdir(exist_ok=True)
    where, name = STEPS[step]
    work = getattr(where, name)

    def work_for_others(self: object, *arguments: object) -> object:
        if step.startswith("delivery to the host") and not step.endswith(arguments[0]):
            return work(self, *arguments)
        raise error

    monkeypatch.setattr(where, name, work_for_others)
    near.inside(attacher.start)
    assert attacher.state().failures == {step: str(error)}
    assert attacher.state().failed == ()
    assert is_attached(near, pins, "eth0")
    assert attacher.state().drops_unseen == (step == "drop program")
    assert (pins / "links" / delivery.SOCKETS).exists() == (step != "delivery to sockets")
    for name in delivery.HOST:
        assert (pins / "links" / name).exists() == (not step.endswith(name))
    assert attacher._next_look < time.monotonic() + 1
    monkeypatch.undo()
    eventually(lambda: not attacher.state().failures)
    assert attacher.alive


def test_delivery_without_a_cgroup_root_is_seen_where_no_socket_takes_it(near, pins, tmp_path):
    made = near.inside(lambda: attacher_of(pins, cgroup=tmp_path))
    near.inside(made.start)
    try:
        (failure,) = made.state().failures.items()
        assert failure[0] == "delivery to sockets"
        assert "is not the root of a cgroup v2 hierarchy of the host" in failure[1]
        assert [name for name in delivery.LINK_PINS if (pins / "links" / name).exists()] == [
            *delivery.HOST
        ]
    finally:
        made.stop()
        shutil.rmtree(pins / "links")


def detach(pin: Path) -> None:
    """Do what `bpftool link detach` does: the pin stays."""
    with bpf_calls.opened(pin) as link:
        cni.detach(link)


def test_a_cgroup_link_that_somebody_detached_is_attached_again(near, pins, attacher):
    near.inside(attacher.start)
    pin = pins / "links" / delivery.SOCKETS
    program = delivery.attached_program(pin)
    detach(pin)
    assert delivery.attached_program(pin) == 0
    near.inside(attacher.reconcile)
    assert delivery.attached_program(pin) == program


@pytest.mark.parametrize("name", delivery.HOST)
def test_a_netfilter_link_that_somebody_detached_is_attached_again(near, pins, attacher, name):
    """Its pin looks the same, but its priority is free."""
    near.inside(attacher.start)
    pin = pins / "links" / name

    def is_attached() -> bool:
        with bpf_calls.opened(pin.parents[1] / build / "programs" / "local_in") as program:
            try:
                os.close(
                    bpf_calls.netfilter_link_create(
                        program,
                        delivery.HOST[name],
                        bpf_calls.NF_INET_LOCAL_IN,
                        delivery._LAST_PRIORITY,
                    )
                )
            except bpf_calls.BpfError as error:
                return error.errno == errno.EBUSY
            return False

    build = loader.current(pins).name
    assert near.inside(is_attached)
    detach(pin)
    assert not near.inside(is_attached)
    near.inside(attacher.reconcile)
    assert near.inside(is_attached)


def test_only_a_pod_without_a_port_id_is_not_attached(ends, pins, attacher, monkeypatch):
    """As on a node with more interfaces than the map has room for."""
    near, far = ends
    near.inside(attacher.start)
    monkeypatch.setattr(bpf_calls.Map, "update", failing(OSError(7, "Argument list too long")))
    ip(f"-n {near.name} link add pod9 type veth peer name pod9 netns {far.name}")
    eventually(lambda: bool(attacher.state().failed))
    (failed,) = attacher.state().failed
    assert failed.interface.name == "pod9"
    assert failed.error == "no port id: [Errno 7] 1 interfaces have one, and no more fit"
    assert is_attached(near, pins, "eth0")
    assert not is_attached(near, pins, "pod9")
    monkeypatch.undo()
    eventually(lambda: not attacher.state().failed)
    assert is_attached(near, pins, "pod9")


def test_what_could_not_be_attached_is_not_missed_four_times_a_second(near, attacher, monkeypatch):
    """It has tries of its own, and those of what somebody removed are not for it."""
    error = failing(OSError(2, "not here"))
    monkeypatch.setattr(delivery, "cgroup_root", error)
    monkeypatch.setattr(bpf_calls, "raw_tracepoint_open", error)
    near.inside(attacher.start)
    assert set(attacher.state().failures) == {"delivery to sockets", "drop program"}
    assert attacher._delivery.in_place()
    assert attacher._drop.in_place()


def test_what_fails_for_long_keeps_nothing_displaced(near, pins, attacher, monkeypatch):
    """Tries of a step that fails each time are spent after some seconds."""
    monkeypatch.setattr(
        delivery.DeliveryLinks, "ensure_sockets", failing(OSError(2, "no cgroup root"))
    )
    near.inside(attacher.start)
    eventually(lambda: not attacher._retries.spend())
    for _ in range(3):
        (pins / "links" / "kfree_skb").unlink()
        eventually((pins / "links" / "kfree_skb").exists, within_s=3.0)


def test_hooks_are_asked_no_more_often_while_messages_come(near, attacher, monkeypatch):
    """Of routes that nothing depends on, as where BGP moves."""
    asked = []
    in_place = attach.TcxHooks.in_place
    monkeypatch.setattr(attach.TcxHooks, "in_place", lambda s: asked.append(1) or in_place(s))
    near.inside(attacher.start)
    asked.clear()
    begun = time.monotonic()
    for _ in range(100):
        route = "blackhole 198.51.100.1/32 table 77"
        ip(*(f"-n {near.name} route {word} {route}" for word in ("add", "del")))
    most = (time.monotonic() - begun) / attach._CHECK_INTERVAL_S + 1
    assert len(asked) <= most < 60


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

    made = near.inside(lambda: attacher_of(pins, mode))
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
