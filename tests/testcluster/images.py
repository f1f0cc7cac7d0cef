# SPDX-License-Identifier: Apache-2.0
"""Container images without a registry: a base from debootstrap, ours by podman, and a pause image of a few bytes of C."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.testcluster import packages
from tests.testcluster.binaries import cache_directory

PAUSE = "localhost/pause:1"
BASE = "docker.io/library/debian:trixie-slim"
VERSION = "0.1.0"
_ROOT = Path(__file__).parents[2]
_PAUSE_C = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"
# what a build in a chroot takes over from this machine: name resolution is podman's, trust is not
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_CERTIFICATES_INSIDE = "/run/build-certificates.crt"


@dataclass(frozen=True)
class Image:
    """An image in a file, as `ctr images import` takes it."""

    name: str
    tar: Path
    digest: str

    @property
    def file_name(self) -> str:
        """The name with nothing in it that a file name must not have."""
        return self.name.replace("/", "_").replace(":", "_")


def _image(name: str, tar: Path, digest: str) -> Image:
    return Image(name, tar, digest)


def pause() -> Image:
    """The image that holds a pod's namespaces."""
    directory = cache_directory() / "images"
    directory.mkdir(parents=True, exist_ok=True)
    tar = directory / "pause.tar"
    digest = hashlib.sha256(_PAUSE_C.encode()).hexdigest()
    if not tar.exists():
        packages.ensure({"gcc": "gcc"})
        with tempfile.TemporaryDirectory() as scratch:
            program = Path(scratch) / "pause"
            command = ["gcc", "-Os", "-static", "-xc", "-", "-o", str(program)]
            subprocess.run(command, input=_PAUSE_C, text=True, check=True)
            _write_single_layer(tar, PAUSE, program)
    return _image(PAUSE, tar, digest)


def _write_single_layer(tar: Path, name: str, program: Path) -> None:
    """A docker-archive with one program, which is its entry point."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as inner:
        inner.add(program, arcname=program.name)
    content = layer.getvalue()
    config = {
        "architecture": "amd64" if os.uname().machine == "x86_64" else "arm64",
        "os": "linux",
        "config": {"Entrypoint": [f"/{program.name}"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    files = {
        "layer.tar": content,
        "config.json": json.dumps(config).encode(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    fresh = tar.with_suffix(".new")
    with tarfile.open(fresh, mode="w") as outer:
        for file_name, data in files.items():
            entry = tarfile.TarInfo(file_name)
            entry.size = len(data)
            outer.addfile(entry, io.BytesIO(data))
    fresh.rename(tar)


def _podman(*arguments: str, **more: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["podman", *arguments], capture_output=True, text=True, **more)  # type: ignore[call-overload,no-any-return]


def ensure_base(say: Callable[[str], None]) -> None:
    """Have the base image, which a registry would give, from Debian's packages."""
    packages.ensure(packages.IMAGES)
    if _podman("image", "exists", BASE).returncode == 0:
        return
    say(f"making the base image {BASE} by debootstrap, about a minute, only this once")
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", "trixie", scratch], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"debootstrap: {done.stdout[-500:]}{done.stderr[-500:]}")
        shutil.rmtree(f"{scratch}/var/cache/apt", ignore_errors=True)
        packed = subprocess.Popen(["tar", "-C", scratch, "-c", "."], stdout=subprocess.PIPE)
        imported = subprocess.run(
            ["podman", "import", "-", BASE], stdin=packed.stdout, capture_output=True, text=True
        )
        if packed.wait() or imported.returncode:
            raise RuntimeError(f"podman import: {imported.stderr[-500:]}")


def build(name: str, say: Callable[[str], None] = print) -> Image:
    """Build `Dockerfile.<name>` as hostint-<name>; unchanged layers are reused."""
    ensure_base(say)
    tag = f"hostint-{name}:{VERSION}"
    with tempfile.TemporaryDirectory() as scratch:
        # whom pip trusts on this machine, for the build only
        configuration = Path(scratch) / "pip.conf"
        configuration.write_text(f"[global]\ncert = {_CERTIFICATES_INSIDE}\n")
        done = _podman(
            *("build", "--isolation=chroot", "--network=host", "--layers", "--pull=never"),
            *("--volume", f"{_CERTIFICATES}:{_CERTIFICATES_INSIDE}:ro"),
            *("--volume", f"{configuration}:/etc/pip.conf:ro"),
            *("-t", f"docker.io/library/{tag}", "-f", f"Dockerfile.{name}", "."),
            cwd=_ROOT,
        )
    if done.returncode:
        raise RuntimeError(f"building {tag}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    digest = _podman("image", "inspect", "--format", "{{.Id}}", tag).stdout.strip()
    directory = cache_directory() / "images"
    directory.mkdir(parents=True, exist_ok=True)
    tar = directory / f"hostint-{name}.tar"
    marker = directory / f"hostint-{name}.digest"
    if not tar.exists() or not marker.exists() or marker.read_text() != digest:
        fresh = tar.with_suffix(".new")
        saved = _podman("save", "-o", str(fresh), f"docker.io/library/{tag}")
        if saved.returncode:
            raise RuntimeError(f"podman save: {saved.stderr[-500:]}")
        fresh.rename(tar)
        marker.write_text(digest)
    return _image(tag, tar, digest)


def build_all(say: Callable[[str], None] = print) -> list[Image]:
    """Both images of the project."""
    return [build(name, say) for name in ("operator", "agent")]
