# SPDX-License-Identifier: Apache-2.0
"""One node: a network namespace and a mount namespace with containerd, kubelet and kube-proxy of its own."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from tests.testcluster import images
from tests.testcluster.control_plane import POD_RANGE, ControlPlane
from tests.testcluster.processes import Processes, wait_until

_CGROUPS = Path("/sys/fs/cgroup")
_K8S = ("-n", "k8s.io")


def ip(*arguments: str, check: bool = True) -> None:
    """Run one `ip` command."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Node:
    """Node `number` of a cluster: `name` in Kubernetes, `address` on the cluster's bridge, pods in `pod_range`."""

    def __init__(self, plane: ControlPlane, number: int, prefix: str, bridge: str) -> None:
        self.number = number
        self.name = f"node-{number}"
        base, _, _ = plane.address.rpartition(".")
        self.address = f"{base}.{10 + number}"
        self.pod_range = f"10.244.{number}.0/24"
        self.netns = f"{prefix}-n{number}"
        self._bridge = bridge
        self._plane = plane
        self.directory = plane.directory / self.netns
        self.processes = Processes(self.directory)
        # image contents outlive the cluster, so that the next one starts at once
        self._images = images.cache_directory() / "containerd" / self.netns
        self._socket = self.directory / "containerd.sock"

    def run(
        self, *arguments: str, check: bool = True, timeout: float = 60, input: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program on the node, as root there."""
        command = [*self.command(), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, input=input)
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def command(self) -> list[str]:
        """What to put before a command line to run it on the node."""
        return [
            "nsenter",
            "--target",
            str(self._holder()),
            "--mount",
            f"--net=/var/run/netns/{self.netns}",
        ]

    def _holder(self) -> int:
        return int((self.directory / "holder.pid").read_text().split()[0])

    def start(self, peers: Iterable["Node"]) -> None:
        """Make the namespaces and start everything in them; does not wait for Ready."""
        (self.directory / "cni").mkdir(parents=True)
        self._images.mkdir(parents=True, exist_ok=True)
        self._network(peers)
        self._cgroup()
        self._certificates()
        self._write_configuration()
        # "ready" once its mounts are made; holds the mount namespace for all others
        mounts = (
            f"mount -t bpf bpf /sys/fs/bpf; mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null; "
            f"touch {self.directory}/mounted; exec sleep infinity"
        )
        self.processes.start(
            "holder",
            [
                *("nsenter", f"--net=/var/run/netns/{self.netns}"),
                *("unshare", "--mount", "--propagation", "private", "sh", "-c", mounts),
            ],
        )
        wait_until((self.directory / "mounted").exists, 10, lambda: self.processes.log("holder"))
        self.processes.start(
            "containerd",
            [*self.command(), "containerd", "--config", f"{self.directory}/containerd.toml"],
        )
        wait_until(self._containerd_answers, 30, lambda: self.processes.log("containerd"))
        self._remove_containers()

    def start_kubelet(self) -> None:
        """Start kube-proxy and the kubelet; images must be loaded before."""
        binaries, directory = self._plane.bin_dir, self.directory
        self.processes.start(
            "kube-proxy",
            [*self.command(), f"{binaries}/kube-proxy", f"--config={directory}/proxy.yaml"],
        )
        self.processes.start(
            "kubelet",
            [
                *(*self.command(), f"{binaries}/kubelet", f"--config={directory}/kubelet.yaml"),
                f"--kubeconfig={self._plane.pki.path(f'{self.name}.conf')}",
                f"--root-dir={directory}/kubelet",
                f"--hostname-override={self.name}",
                f"--node-ip={self.address}",
            ],
        )

    def stop(self) -> None:
        """End everything of this node, containers included."""
        for name in ("kubelet", "kube-proxy"):
            self.processes.stop(name)
        if self._socket.exists() and (self.directory / "holder.pid").exists():
            with contextlib.suppress(RuntimeError, OSError, subprocess.SubprocessError):
                self._remove_containers()
        for name in ("containerd", "holder"):
            self.processes.stop(name)
        ip("netns", "del", self.netns, check=False)
        for controller in _controllers():
            for path in sorted((controller / self.netns).rglob("*"), reverse=True):
                if path.is_dir():
                    with contextlib.suppress(OSError):
                        path.rmdir()
            with contextlib.suppress(OSError):
                (controller / self.netns).rmdir()

    def load_image(self, image: images.Image) -> None:
        """Import an image unless this very one is there already."""
        marker = self._images / f"{image.file_name}.digest"
        if marker.exists() and marker.read_text() == image.digest:
            return
        self._ctr("images", "import", str(image.tar), timeout=300)
        marker.write_text(image.digest)

    def _ctr(self, *arguments: str, timeout: float = 30) -> list[str]:
        done = self.run("ctr", "-a", str(self._socket), *_K8S, *arguments, timeout=timeout)
        return done.stdout.split()

    def _containerd_answers(self) -> bool:
        return self.run("ctr", "-a", str(self._socket), "version", check=False).returncode == 0

    def _remove_containers(self) -> None:
        """Kill and forget all containers, also those of a run that was killed."""
        for _ in range(2):
            for task in self._ctr("tasks", "ls", "-q"):
                self.run(
                    "ctr",
                    "-a",
                    str(self._socket),
                    *_K8S,
                    "tasks",
                    "kill",
                    "-s",
                    "9",
                    task,
                    check=False,
                )
            time.sleep(0.3)
            for container in self._ctr("containers", "ls", "-q"):
                for command in (("tasks", "delete", "-f"), ("containers", "rm")):
                    self.run(
                        "ctr", "-a", str(self._socket), *_K8S, *command, container, check=False
                    )

    def _network(self, peers: Iterable["Node"]) -> None:
        outside = f"{self._bridge}p{self.number}"
        ip("netns", "add", self.netns)
        ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", self.netns)
        ip("link", "set", outside, "master", self._bridge, "up")
        here = ("-n", self.netns)
        ip(*here, "link", "set", "lo", "up")
        ip(*here, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip(*here, "link", "set", "eth0", "up")
        ip(*here, "route", "add", "default", "via", self._plane.address)
        ip("route", "replace", self.pod_range, "via", self.address)
        forward = [
            "nsenter",
            f"--net=/var/run/netns/{self.netns}",
            "sysctl",
            "-qw",
            "net.ipv4.ip_forward=1",
        ]
        subprocess.run(forward, check=True)
        for peer in peers:
            if peer.number != self.number:
                ip(*here, "route", "add", peer.pod_range, "via", peer.address)

    def _cgroup(self) -> None:
        for controller in _controllers():
            (controller / self.netns).mkdir(exist_ok=True)
        cpuset = _CGROUPS / "cpuset"
        for name in ("cpus", "mems"):
            source = cpuset / f"cpuset.{name}"
            if source.exists():
                (cpuset / self.netns / f"cpuset.{name}").write_text(source.read_text())

    def _certificates(self) -> None:
        pki, subject = self._plane.pki, f"/O=system:nodes/CN=system:node:{self.name}"
        pki.certificate(self.name, subject, "extendedKeyUsage=clientAuth")
        pki.certificate(f"{self.name}-server", subject, f"subjectAltName=IP:{self.address}")
        pki.kubeconfig(self.name, self._plane.server)

    def _write_configuration(self) -> None:
        directory, pki = self.directory, self._plane.pki.path
        (directory / "cni" / "10-pods.conflist").write_text(self._cni())
        (directory / "containerd.toml").write_text(self._containerd())
        on_v2 = (_CGROUPS / "cgroup.controllers").exists()
        (directory / "kubelet.yaml").write_text(
            f"""apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupsPerQOS: {str(not on_v2).lower()}
cgroupRoot: {"" if on_v2 else f"/{self.netns}"}
failSwapOn: false
oomScoreAdj: 0
localStorageCapacityIsolation: false
enforceNodeAllocatable: []
evictionHard: {{memory.available: 100Mi}}
imageMinimumGCAge: 24h
imageGCHighThresholdPercent: 100
syncFrequency: 10s
podLogsDir: {directory}/pod-logs
containerRuntimeEndpoint: unix://{self._socket}
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
nodeStatusUpdateFrequency: 4s
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: true}}
  x509: {{clientCAFile: {pki("ca.crt")}}}
authorization: {{mode: Webhook}}
tlsCertFile: {pki(f"{self.name}-server.crt")}
tlsPrivateKeyFile: {pki(f"{self.name}-server.key")}
"""
        )
        (directory / "proxy.yaml").write_text(
            f"""apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: {self.name}
clusterCIDR: {POD_RANGE}
clientConnection: {{kubeconfig: {self._plane.kubeconfig}}}
conntrack: {{maxPerCore: 0, min: 0}}
bindAddress: {self.address}
healthzBindAddress: {self.address}:10256
metricsBindAddress: 127.0.0.1:10249
"""
        )

    def _cni(self) -> str:
        bridge = {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "hairpinMode": True,
            "ipMasq": False,
            "ipam": {
                "type": "host-local",
                "dataDir": f"{self.directory}/ipam",
                "ranges": [[{"subnet": self.pod_range}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        return json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, portmap]})

    def _containerd(self) -> str:
        return f"""version = 2
root = "{self._images}"
state = "{self.directory}/containerd-state"
[grpc]
address = "{self._socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{images.PAUSE}"
restrict_oom_score_adj = true
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{self.directory}/cni"
"""


def _controllers() -> list[Path]:
    """Roots of the cgroup hierarchies: one a controller (v1), or one for all (v2)."""
    if (_CGROUPS / "cgroup.controllers").exists():
        return [_CGROUPS]
    return [
        path
        for path in _CGROUPS.iterdir()
        if path.is_dir() and path.name != "unified" and os.access(path, os.W_OK)
    ]
