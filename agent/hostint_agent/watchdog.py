# SPDX-License-Identifier: Apache-2.0
"""End a process whose event loop stands still, and say where every thread was.

There is no liveness probe on purpose: kubelet would ask a port of the host's network, where another
program may answer in the agent's place, or clients take all room, and would then kill an agent that
works. faulthandler waits in a thread without the interpreter's lock, so it also ends a process in
which no Python code runs any more.
"""

import asyncio
import faulthandler

STANDSTILL_S = 60.0
_BEAT_S = 5.0


async def watch() -> None:
    """Put the end off again and again, until cancelled."""
    try:
        while True:
            faulthandler.dump_traceback_later(STANDSTILL_S, exit=True)
            await asyncio.sleep(_BEAT_S)
    finally:
        faulthandler.cancel_dump_traceback_later()
