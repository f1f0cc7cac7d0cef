# SPDX-License-Identifier: Apache-2.0
"""A process whose event loop stands still ends, and says where; another one does not."""

import subprocess
import sys
import textwrap

import pytest

PROCESS = """
    import asyncio, contextlib, sys, threading, time
    from hostint_agent import watchdog
    watchdog.STANDSTILL_S, watchdog._BEAT_S = {standstill_s}, 0.1

    def hold_the_lock():
        import ctypes
        ctypes.PyDLL(None).sleep(20)

    async def whole():
        watching = asyncio.create_task(watchdog.watch())
        await asyncio.sleep(1)
        print("after a while", flush=True)
        {deed}
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching

    asyncio.run(whole())
    time.sleep(1)
    print("the end", flush=True)
"""


def process(deed: str, standstill_s: float) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(PROCESS).format(deed=deed, standstill_s=standstill_s)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)


@pytest.mark.parametrize("deed", ["time.sleep(20)", "hold_the_lock()"])
def test_standstill_ends_the_process_with_a_traceback(deed):
    ended = process(deed, 0.5)
    assert (ended.returncode, ended.stdout) == (1, "after a while\n")
    assert "Timeout (0:00:00.500000)!" in ended.stderr
    assert "in whole" in ended.stderr


def test_process_that_goes_on_is_left_alone():
    """For longer than it may stand still, which a busy machine may have it do for a while."""
    ended = process("await asyncio.sleep(4)", 3.0)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "after a while\nthe end\n", "")
