# SPDX-License-Identifier: Apache-2.0
"""`make demo`: hostint on a real two-node Kubernetes, a small application, trouble on purpose, and what the reports say."""

import argparse
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from hostint_collector import show
from tests.e2e import deployment
from tests.lab import try_it
from tests.testcluster import Cluster, binaries, images
from tests.testcluster.cluster import ClusterBusy

_EXPECT_S = 15.0
_SHOWN_PER_SCENE = 6
Record = deployment.Record


class Stage:
    """Narration, the reports as they arrive (not all of them: the application is busy), and what was expected."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.started = time.monotonic()
        self._coloured = show.use_colour(sys.stdout)
        self._left = 0
        self._lock = threading.Lock()
        self.reported: list[tuple[str, Record]] = []
        self.missing: list[str] = []
        self.log: deployment.CollectorLog | None = None

    def say(self, text: str) -> None:
        """One line of narration with the time since the start."""
        line = f"[{time.monotonic() - self.started:5.1f} s] {text}"
        with self._lock:
            print(f"\x1b[1m{line}\x1b[0m" if self._coloured else line, flush=True)
            self._left = _SHOWN_PER_SCENE

    def show(self, record: Record) -> None:
        """Show a report if it is among the first of its scene, or a drop."""
        with self._lock:
            if self._left > 0:
                self._left -= 1
                print("    " + show.table_line(record, self._coloured), flush=True)

    def expect(self, what: str, wanted: Callable[[Record], bool]) -> None:
        """Wait for a report and remember it, or that it did not come."""
        assert self.log
        try:
            record = self.log.wait(wanted, _EXPECT_S)
        except TimeoutError:
            self.missing.append(what)
            self.say(f"NOT REPORTED: {what}")
        else:
            self.reported.append((what, record))

    def kubectl(self, *arguments: str) -> None:
        """Run kubectl for the audience."""
        print(f"$ kubectl {' '.join(arguments)}", flush=True)
        print(self.cluster.kubectl(*arguments).stdout, flush=True)


def _flow(node: str, **inner: object) -> Callable[[Record], bool]:
    return lambda r: r["kind"] == "flow" and r["node"] == node and _has(r, inner)


def _drop(node: str, reasons: tuple[int, ...], **inner: object) -> Callable[[Record], bool]:
    return lambda r: (
        r["kind"] == "drop" and r["node"] == node and r["dropReason"] in reasons and _has(r, inner)
    )


def _has(record: Record, inner: dict[str, object]) -> bool:
    return all(record["inner"][key] == value for key, value in inner.items())


@contextlib.contextmanager
def trouble(stage: Stage, text: str, node: int, begin: list[str], end: list[str]) -> Iterator[None]:
    """Break something on a node, and mend it."""
    assert stage.log
    stage.log.clear()
    stage.say(f"{text}: {' '.join(begin)}")
    machine = stage.cluster.node(node)
    machine.run(*begin)
    try:
        yield
    finally:
        machine.run(*end)


def play(stage: Stage) -> None:
    """The application at work, then trouble."""
    cluster = stage.cluster
    first, second = (node.address for node in cluster.nodes)
    client, web, backend = (
        deployment.pod(cluster, "demo", app) for app in ("client", "web", "backend")
    )
    vip = cluster.get("service", "web", "-n", "demo")["spec"]["clusterIP"]
    stage.say(
        f"client {client.address} on node-1 asks Service web {vip}; web {web.address} on node-2 asks backend {backend.address} on node-1"
    )
    stage.expect(
        "client to web, at the client's node",
        _flow(first, sourceAddress=client.address, destinationPort=8080),
    )
    stage.expect(
        "client to web, at web's node",
        _flow(second, sourceAddress=client.address, destinationAddress=web.address),
    )
    stage.expect(
        "the answer, with the Service's address",
        _flow(first, sourceAddress=vip, destinationAddress=client.address),
    )
    stage.expect(
        "web to backend, at web's node",
        _flow(second, sourceAddress=web.address, destinationPort=5432),
    )
    stage.expect(
        "web to backend, at the backend's node",
        _flow(first, sourceAddress=web.address, destinationPort=5432),
    )

    nft = "nft add table inet trouble; nft add chain inet trouble forward '{ type filter hook forward priority 0; }'; "
    with trouble(
        stage,
        "A firewall rule on node-1",
        1,
        ["sh", "-c", nft + "nft add rule inet trouble forward tcp dport 5432 drop"],
        ["nft", "delete", "table", "inet", "trouble"],
    ):
        stage.expect(
            "dropped by the firewall of node-1",
            _drop(first, (80,), destinationAddress=backend.address, destinationPort=5432),
        )
    hole = f"blackhole {backend.address}/32"
    with trouble(
        stage,
        "A black-hole route on node-2",
        2,
        ["ip", "route", "add", *hole.split()],
        ["ip", "route", "del", *hole.split()],
    ):
        stage.expect(
            "taken by the black hole of node-2",
            _drop(second, (0, 29), sourceAddress=web.address, destinationPort=5432),
        )
    slow = "tc qdisc replace dev cni0 root tbf rate 20mbit burst 4000 limit 400000"
    with trouble(
        stage,
        "A slow link to the pods of node-1",
        1,
        slow.split(),
        "tc qdisc del dev cni0 root".split(),
    ):
        stage.expect(
            "held up on node-1: hop latency over 5 ms, Q bit set",
            lambda r: (
                r["kind"] in ("flow", "queue")
                and r["node"] == first
                and r["flags"]["q"]
                and r["hopLatency"] >= 5_000_000
            ),
        )
    narrow = "tc qdisc replace dev cni0 root tbf rate 2mbit burst 4000 limit 9000"
    with trouble(
        stage,
        "And one whose queue is too short",
        1,
        narrow.split(),
        "tc qdisc del dev cni0 root".split(),
    ):
        stage.expect("dropped by a full queue of node-1", _drop(first, (71,)))


def summary(stage: Stage) -> None:
    """The last lines."""
    print("\nReported, and from where:")
    for what, record in stage.reported:
        if record["kind"] != "drop":
            held = show.latency(record["hopLatency"])
            print(f"  node {record['node']}: {what}: {show.flow(record['inner'])}, {held}")
    print("Dropped, and why:")
    for what, record in stage.reported:
        if record["kind"] == "drop":
            reason = f"{record['dropReasonName']} ({record['dropReason']})"
            print(f"  node {record['node']}: {what}: {show.flow(record['inner'])}: {reason}")


def prepare(stage: Stage) -> None:
    """Build what must be built, start the cluster, install everything."""
    if not binaries.are_built():
        stage.say(
            "first time here: Kubernetes is built from source, some 5 to 12 minutes; after that a demo takes about a minute"
        )
    images_built = images.build_all(stage.say)
    stage.cluster.set_images(images_built)
    stage.say("starting a two-node cluster")
    stage.cluster.start()
    stage.say("kubectl apply -k manifests/")
    deployment.install(stage.cluster)
    stage.say("kubectl apply -k manifests/collector/, manifests/samples/, and a small application")
    with ThreadPoolExecutor() as pool:
        work = [
            pool.submit(deployment.install_collector, stage.cluster),
            pool.submit(deployment.install_app, stage.cluster),
            pool.submit(
                stage.cluster.kubectl, "apply", "-k", str(deployment.MANIFESTS / "samples")
            ),
        ]
        for future in work:
            future.result()


def keep_going(cluster: Cluster) -> None:
    """What to do with a cluster that was left running."""
    print(
        f"\nThe cluster is left running. Five things to try:\n\n  export KUBECONFIG={cluster.kubeconfig} PATH={cluster.plane.bin_dir}:$PATH\n"
    )
    print("  kubectl get iwl,icol,inc")
    print("  kubectl logs -n hostint-system deploy/hostint-collector -f")
    print("  kubectl edit iwl web          # another port, another interval: live within a second")
    print(
        "  kubectl delete pod -n hostint-system -l app.kubernetes.io/name=hostint-agent    # the datapath stays"
    )
    print("  kubectl describe iwl web      # what status says in words")
    print("\nStop it with: .venv/bin/python -m tests.testcluster down")


def main() -> int:
    """Entry point: 0 if everything expected was reported."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave everything running at the end")
    parser.add_argument(
        "--skip-try", action="store_true", help="do not play the scene of `make try` first"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stage = Stage(Cluster(say=lambda text: stage.say(text)))
    try:
        if not options.skip_try:
            stage.say("first a taste without Kubernetes (make try)")
            if try_it.main():
                return 1
        prepare(stage)
        stage.log = deployment.CollectorLog(stage.cluster, stage.show)
        stage.cluster.kubectl(
            "wait", "--for=condition=Ready", "iwl/web", "--timeout=60s", timeout=70
        )
        stage.kubectl("get", "iwl,icol,inc")
        play(stage)
        stage.kubectl("get", "iwl,icol,inc")
        summary(stage)
        if options.keep:
            keep_going(stage.cluster)
            stage.cluster.release()
    except KeyboardInterrupt:
        print("\nstopping, and cleaning up ...", flush=True)
        return 130
    except ClusterBusy as error:
        print(
            f"make demo: {error}, or stop it: .venv/bin/python -m tests.testcluster down",
            file=sys.stderr,
        )
        return 1
    finally:
        if stage.log:
            stage.log.stop()
        if not (options.keep and stage.log):
            stage.cluster.stop()
    took = time.monotonic() - stage.started
    if stage.missing:
        print(f"\nNot reported: {', '.join(stage.missing)}", file=sys.stderr)
        return 1
    print(f"\nEverything expected was reported; {took:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
