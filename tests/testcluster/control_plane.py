# SPDX-License-Identifier: Apache-2.0
"""etcd, kube-apiserver, controller manager and scheduler, on addresses of this machine's own."""

import json
import secrets
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any, Self

from tests.testcluster import binaries, packages
from tests.testcluster.processes import Processes, wait_until

SERVICE_RANGE = "10.96.0.0/16"
POD_RANGE = "10.244.0.0/16"


class KubectlError(RuntimeError):
    """kubectl failed; the text is what it said."""


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Pki:
    """A certificate authority, and certificates and kubeconfigs from it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        """A file of it."""
        return self.directory / name

    def create(self) -> None:
        """Make the authority and the key that signs service account tokens."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._openssl(
            *"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj /CN=ca".split(),
            # Python 3.13 wants a certificate authority to say that it is one
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
            *("-keyout", str(self.path("ca.key")), "-out", str(self.path("ca.crt"))),
        )
        self._openssl("genrsa", "-out", str(self.path("sa.key")), "2048")

    def certificate(self, name: str, subject: str, extension: str) -> None:
        """Make NAME.crt and NAME.key."""
        key, request = str(self.path(f"{name}.key")), str(self.path(f"{name}.csr"))
        extensions = self.path(f"{name}.ext")
        extensions.write_text(
            f"{extension}\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        )
        self._openssl(
            *"req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes".split(),
            *("-keyout", key, "-out", request, "-subj", subject),
        )
        self._openssl(
            *("x509", "-req", "-in", request, "-CA", str(self.path("ca.crt"))),
            *(
                "-CAkey",
                str(self.path("ca.key")),
                "-set_serial",
                str(secrets.randbits(63)),
                "-days",
                "365",
            ),
            *("-out", str(self.path(f"{name}.crt")), "-extfile", str(extensions)),
        )

    def kubeconfig(self, name: str, server: str) -> Path:
        """Make NAME.conf for the certificate NAME."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "test",
                    "cluster": {
                        "server": server,
                        "certificate-authority": str(self.path("ca.crt")),
                    },
                }
            ],
            "users": [
                {
                    "name": "user",
                    "user": {
                        "client-certificate": str(self.path(f"{name}.crt")),
                        "client-key": str(self.path(f"{name}.key")),
                    },
                }
            ],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "user"}}],
            "current-context": "test",
        }
        path = self.path(f"{name}.conf")
        path.write_text(json.dumps(config, indent=1))
        return path

    @staticmethod
    def _openssl(*arguments: str) -> None:
        done = subprocess.run(["openssl", *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"openssl {arguments[0]}: {done.stderr.strip()}")


class ControlPlane:
    """A control plane without nodes. `address` is what everybody reaches it by."""

    def __init__(
        self, directory: Path, address: str = "127.0.0.1", *, scheduler: bool = False
    ) -> None:
        self.directory = directory
        self.address = address
        self._scheduler = scheduler
        self.bin_dir = binaries.directory()
        self.pki = Pki(directory / "pki")
        self.kubeconfig = self.pki.path("admin.conf")
        self.processes = Processes(directory)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and wait until the API server is ready."""
        packages.ensure(packages.CONTROL_PLANE)
        self.bin_dir = binaries.ensure()
        self.port = free_port()
        self.server = f"https://{self.address}:{self.port}"
        self._certificates()
        etcd = self._start_etcd()
        self._start_api_server(etcd)
        wait_until(self._is_ready, 60, lambda: self.processes.log("apiserver"))
        self._start_controllers()

    def stop(self) -> None:
        """End everything and forget the state."""
        for name in ("scheduler", "kcm", "apiserver", "etcd"):
            self.processes.stop(name)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _certificates(self) -> None:
        self.pki.create()
        names = (
            f"IP:127.0.0.1,IP:{self.address},IP:10.96.0.1,DNS:localhost,DNS:kubernetes.default.svc"
        )
        self.pki.certificate("server", "/CN=kube-apiserver", f"subjectAltName={names}")
        client = "extendedKeyUsage=clientAuth"
        self.pki.certificate("admin", "/O=system:masters/CN=admin", client)
        self.pki.certificate("kubelet-client", "/O=system:masters/CN=kubelet-client", client)
        self.pki.kubeconfig("admin", self.server)

    def _start_etcd(self) -> str:
        client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self.processes.start(
            "etcd",
            [
                *("etcd", "--data-dir", str(self.directory / "etcd"), "--unsafe-no-fsync"),
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", f"default={peer}"),
            ],
        )
        return client

    def _start_api_server(self, etcd: str) -> None:
        pki = self.pki.path
        options = {
            "etcd-servers": etcd,
            "bind-address": "0.0.0.0",
            "advertise-address": self.address if self.address != "127.0.0.1" else "192.0.2.1",
            "secure-port": str(self.port),
            "tls-cert-file": str(pki("server.crt")),
            "tls-private-key-file": str(pki("server.key")),
            "client-ca-file": str(pki("ca.crt")),
            "authorization-mode": "Node,RBAC",
            "enable-admission-plugins": "NodeRestriction",
            "allow-privileged": "true",
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": str(pki("sa.key")),
            "service-account-signing-key-file": str(pki("sa.key")),
            "service-cluster-ip-range": SERVICE_RANGE,
            "kubelet-client-certificate": str(pki("kubelet-client.crt")),
            "kubelet-client-key": str(pki("kubelet-client.key")),
            "kubelet-preferred-address-types": "InternalIP",
        }
        command = [str(self.bin_dir / "kube-apiserver")]
        self.processes.start("apiserver", command + [f"--{k}={v}" for k, v in options.items()])

    def _start_controllers(self) -> None:
        admin = f"--kubeconfig={self.kubeconfig}"
        left_out = (
            "nodeipam node-route-controller service-lb-controller cloud-node-lifecycle".split()
        )
        self.processes.start(
            "kcm",
            [
                *(str(self.bin_dir / "kube-controller-manager"), admin, "--leader-elect=false"),
                *(
                    f"--service-account-private-key-file={self.pki.path('sa.key')}",
                    "--secure-port=0",
                ),
                *(f"--root-ca-file={self.pki.path('ca.crt')}", "--use-service-account-credentials"),
                *(f"--cluster-cidr={POD_RANGE}", f"--controllers=*,-{',-'.join(left_out)}"),
            ],
        )
        if self._scheduler:
            command = [str(self.bin_dir / "kube-scheduler"), admin, "--leader-elect=false"]
            self.processes.start("scheduler", [*command, "--secure-port=0"])

    def _is_ready(self) -> bool:
        return self.kubectl("get", "--raw", "/readyz", check=False).returncode == 0

    def kubectl(
        self, *arguments: str, input: str | None = None, check: bool = True, timeout: float = 60
    ) -> "subprocess.CompletedProcess[str]":
        """Run kubectl as administrator. Raises KubectlError with what it said."""
        done = subprocess.run(
            [str(self.bin_dir / "kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments],
            input=input if input is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def get(self, *arguments: str) -> Any:
        """`kubectl get ... -o json`, parsed."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json").stdout)
