# SPDX-License-Identifier: Apache-2.0
"""What `hostint-agent doctor` finds, by a process of its own, and what a finding has to be like."""

import json
import subprocess
import sys

from hostint_agent.doctor import finding

COMMAND = [sys.executable, "-m", "hostint_agent", "doctor"]
Findings = dict[str, finding.Finding]


def run(*options: object, before=(), **more) -> subprocess.CompletedProcess[str]:
    command = [*before, *COMMAND, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **more)


def examine(*options: object, before=(), **more) -> Findings:
    """Findings of the whole command by check."""
    ended = run("--json", *options, before=before, **more)
    assert "Traceback" not in ended.stderr
    told = [finding.Finding(**each) for each in json.loads(ended.stdout)]
    assert ended.returncode == int(any(each.result == "failure" for each in told))
    return {each.check: each for each in told}


def is_ok(found: finding.Finding, *words: str) -> None:
    assert found.result == "ok", found
    assert not found.remedy
    assert all(each in found.found for each in words), found


def warns(found: finding.Finding, *words: str) -> None:
    assert found.result == "warning", found
    assert all(each in f"{found.found} -> {found.remedy}" for each in words), found
    assert found.remedy


def fails(found: finding.Finding, *words: str) -> None:
    assert found.result == "failure", found
    assert all(each in f"{found.found} -> {found.remedy}" for each in words), found
    assert found.remedy
