# SPDX-License-Identifier: Apache-2.0
"""Facts about the repository that rot unless somebody looks."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
).stdout.split()
PYTHON = [name for name in TRACKED if name.endswith(".py") and (ROOT / name).exists()]
C = [name for name in TRACKED if name.endswith((".c", ".h")) and (ROOT / name).exists()]
DOCS = [name for name in TRACKED if name.endswith(".md") and (ROOT / name).exists()]


def test_there_is_something_to_look_at():
    assert PYTHON
    assert C
    assert "README.md" in DOCS


def test_the_folder_operator_is_no_package():
    """With an __init__.py it would shadow the standard library's operator."""
    assert not (ROOT / "operator" / "__init__.py").exists()
    code = "import collections, operator; operator.itemgetter"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", PYTHON)
def test_a_module_says_what_it_is_for(name):
    text = (ROOT / name).read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text)), f"{name} needs a docstring: its single job"


@pytest.mark.parametrize("name", C)
def test_a_c_file_names_its_licence(name):
    assert "SPDX-License-Identifier" in (ROOT / name).read_text().splitlines()[0]


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"


def test_the_readme_names_only_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test", "try"} <= named <= targets


def test_every_measured_figure_names_the_test_behind_it():
    """A figure that nobody measures again is a memory."""
    text = (ROOT / "README.md").read_text()
    table = re.search(r"## Measured\n.*?\n(\|.*?)\n\n", text, re.DOTALL)
    assert table
    header, _, *rows = (line.strip("| ").split(" | ") for line in table[1].splitlines())
    assert header == ["what", "figure", "by"]
    assert len(rows) > 10
    for row in rows:
        name = re.fullmatch(r"`(tests/.+\.py)`", row[-1])
        assert name, row
        assert name[1] in PYTHON
        # A bench is run by its name, a test by pytest.
        text = (ROOT / name[1]).read_text()
        assert "\ndef test_" in text or "\ndef run(quick" in text, row


def test_ci_runs_the_readmes_test_command():
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()


def test_every_setting_of_a_manifest_is_one_the_programs_know():
    manifests = "".join(p.read_text() for p in (ROOT / "manifests").rglob("*.yaml"))
    sources = "".join(
        p.read_text() for folder in ("agent", "operator") for p in (ROOT / folder).rglob("*.py")
    )
    for variable in set(re.findall(r"HOSTINT_(\w+)", manifests)):
        assert f"HOSTINT_{variable}" in sources or f'"{variable}"' in sources, variable


def test_every_watchlist_counter_is_a_metric_with_words():
    from hostint_agent import counters, metrics

    assert set(metrics._WATCHLIST_HELP) == set(counters.WATCHLIST_FIELDS)
