# SPDX-License-Identifier: Apache-2.0
"""bpf/types.h and its ctypes mirror agree, field by field and value by value: checked by the C compiler."""

import ctypes
import enum
import inspect
import re
import subprocess
from pathlib import Path

from hostint_agent import bpf_types, loader

BPF_DIR = loader.default_bpf_dir()
HEADER = (BPF_DIR / "types.h").read_text()


def c_name(python_name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", python_name).lower()


def structures() -> list[type[ctypes.Structure]]:
    members = inspect.getmembers(bpf_types, inspect.isclass)
    return [m for _, m in members if issubclass(m, ctypes.Structure)]


def enums() -> list[type[enum.IntEnum]]:
    members = inspect.getmembers(bpf_types, inspect.isclass)
    return [m for _, m in members if issubclass(m, enum.IntEnum | enum.IntFlag)]


def assertions() -> list[str]:
    lines = []
    for structure in structures():
        name = f"struct {c_name(structure.__name__)}"
        lines.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(structure)}, "{name}");')
        for field, *_ in structure._fields_:
            offset, size = getattr(structure, field).offset, getattr(structure, field).size
            where = f"{name}.{field}"
            lines.append(
                f'_Static_assert(__builtin_offsetof({name}, {field}) == {offset}, "{where}");'
            )
            lines.append(
                f'_Static_assert(sizeof((({name} *)0)->{field}) == {size}, "{where} size");'
            )
    return lines


def compiles(lines: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    source = tmp_path / "mirror.c"
    source.write_text('#include "types.h"\n' + "\n".join(lines))
    return subprocess.run(
        ["gcc", "-Wall", "-Werror", "-fsyntax-only", f"-I{BPF_DIR}", str(source)],
        capture_output=True,
        text=True,
    )


def test_every_structure_has_the_same_layout(tmp_path):
    result = compiles(assertions(), tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_shifted_field_is_noticed(tmp_path):
    wrong = [line.replace("arrival_ns) == 8", "arrival_ns) == 12") for line in assertions()]
    assert wrong != assertions()
    assert "slot.arrival_ns" in compiles(wrong, tmp_path).stderr


def test_every_structure_of_the_header_is_mirrored():
    in_header = set(re.findall(r"^struct (\w+) \{", HEADER, re.MULTILINE))
    assert in_header == {c_name(structure.__name__) for structure in structures()}


def header_enums() -> dict[str, dict[str, int]]:
    found = re.findall(r"^enum (\w+) \{(.*?)^\};", HEADER, re.MULTILINE | re.DOTALL)
    return {
        name: {n: int(v) for n, v in re.findall(r"^\t(\w+) = (\d+)", body, re.MULTILINE)}
        for name, body in found
    }


def test_every_enumerator_has_the_same_value():
    mirrored = {c_name(kind.__name__): [m.value for m in kind] for kind in enums()}
    in_header = {
        name: [value for key, value in members.items() if not key.startswith("NR_")]
        for name, members in header_enums().items()
    }
    assert mirrored == in_header


def test_every_enumerator_has_the_same_name():
    by_name = {c_name(kind.__name__): kind for kind in enums()}
    for name, members in header_enums().items():
        endings = [key for key in members if not key.startswith("NR_")]
        assert all(
            key.endswith(f"_{member.name}")
            for key, member in zip(endings, by_name[name], strict=True)
        ), name


def test_every_limit_has_the_same_value():
    defines = re.findall(r"^#define (\w+) (0x[0-9a-f]+|\d+)", HEADER, re.MULTILINE)
    in_header = {name: int(value, 0) for name, value in defines}
    assert {n: getattr(bpf_types, n) for n in in_header} == in_header
