# SPDX-License-Identifier: Apache-2.0
"""Debian packages that the test cluster needs, and their installation where they are missing."""

import os
import shutil
import subprocess
import sys

# a program that shows that the package is there -> the package
CONTROL_PLANE = {"etcd": "etcd-server", "openssl": "openssl"}
NODES = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "ip": "iproute2",
    "nft": "nftables",
    "iptables": "iptables",
    "nsenter": "util-linux",
    "modprobe": "kmod",
    "mount": "mount",
}
IMAGES = {"podman": "podman", "debootstrap": "debootstrap", "gcc": "gcc", "buildah": "buildah"}


def missing(programs: dict[str, str]) -> list[str]:
    """Packages of these whose program is not there."""
    return sorted({package for program, package in programs.items() if not shutil.which(program)})


def ensure(*groups: dict[str, str]) -> None:
    """Install what is missing; one line of progress, the package manager's words only if it fails."""
    wanted = sorted({package for group in groups for package in missing(group)})
    if not wanted:
        return
    print(f"installing Debian packages: {' '.join(wanted)}", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *wanted],
    ):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
            raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}")
