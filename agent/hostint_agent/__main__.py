# SPDX-License-Identifier: Apache-2.0
"""The command `hostint-agent`."""

import argparse
import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import structlog

from hostint_agent import (
    agent,
    bpf_calls,
    bpf_filesystem,
    check,
    command_line,
    counters,
    interfaces,
    kernel,
    loader,
    logs,
    settings,
    standalone,
    unload,
    watchdog,
)
from hostint_api import NodeConfigSpec

log = structlog.get_logger()

_NEEDS = "needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (run as root, or give the container these capabilities)"
# an agent that is being replaced needs up to two seconds to end
_LOCK_WAIT_S = 3.0


class StartError(Exception):
    """The agent cannot start; says why, and what to do."""


def ensure_bpffs(pin_dir: Path) -> None:
    """Make `pin_dir` a directory of a bpffs, mounting one if there is none and we may. Raises StartError."""
    if bpf_filesystem.holds(bpf_filesystem.existing(pin_dir)):
        return _make(pin_dir)
    mount_point = bpf_filesystem.MOUNT_POINT
    hint = f"mount one with: mount -t bpf bpf {mount_point}"
    if mount_point not in (pin_dir, *pin_dir.parents):
        raise StartError(
            f"pin directory {pin_dir} is not in a bpffs; choose one below {mount_point}"
        )
    mounted = subprocess.run(  # noqa: S603 (a fixed command)
        ["mount", "-t", "bpf", "bpf", str(mount_point)],  # noqa: S607 (the system's mount)
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        raise StartError(f"no bpffs at {mount_point}: {mounted.stderr.strip()}; {hint}")
    return _make(pin_dir)


def _make(pin_dir: Path) -> None:
    try:
        pin_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(
            f"pin directory {pin_dir}: {error.strerror}; the agent {_NEEDS}"
        ) from error


@contextlib.contextmanager
def _alone(pin_dir: Path) -> Iterator[int]:
    """Be the only process that works with this pin directory; two would send every report twice.

    Yields a descriptor of the directory, which holds the lock. Raises StartError.
    """
    deadline = time.monotonic() + _LOCK_WAIT_S
    while (directory := _locked(pin_dir)) is None:
        if time.monotonic() > deadline:
            raise StartError(
                f"pin directory {pin_dir} is in use by another hostint-agent; stop that one first"
            )
        time.sleep(0.1)
    # the loader is ours too: should we be killed, nobody else begins before it has ended
    os.set_inheritable(directory, True)
    try:
        yield directory
    finally:
        os.close(directory)


def _locked(pin_dir: Path) -> int | None:
    """A descriptor that holds the lock of the directory that has this name now; None if another process has it."""
    pin_dir.mkdir(parents=True, exist_ok=True)
    directory = os.open(pin_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # whoever had it may have removed the directory, and a third may have made it anew
        if _is_at(pin_dir, directory):
            return directory
    except BlockingIOError:
        pass
    except BaseException:
        os.close(directory)
        raise
    os.close(directory)
    return None


def _is_at(pin_dir: Path, directory: int) -> bool:
    """Return True if this descriptor is of the directory that has the name now."""
    try:
        return os.path.samestat(os.fstat(directory), pin_dir.stat())
    except FileNotFoundError:
        return False


def start(process: agent.Agent) -> None:
    """Bring the datapath up. Raises StartError."""
    try:
        process.start()
    except PermissionError as error:
        raise StartError(f"{error.filename}: {error.strerror}; the agent {_NEEDS}") from error
    except (loader.LoadError, kernel.KernelError) as error:
        words = f"; the agent {_NEEDS}" if "not permitted" in str(error) else ""
        raise StartError(f"{error}{words}") from error
    except OSError as error:
        raise StartError(f"{error.filename or 'datapath'}: {error.strerror}") from error


async def _until_stopped(*tasks: Coroutine[Any, Any, None]) -> None:
    """Run until SIGTERM or SIGINT; a task that fails ends the process."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(task) for task in tasks]
        await stopped.wait()
        for task in running:
            task.cancel()


async def _apply_latest(process: agent.Agent, queue: "asyncio.Queue[agent.Wanted]") -> None:
    """Make configurations live one after the other; of several that wait, the last."""
    while True:
        wanted = await queue.get()
        while not queue.empty():
            wanted = queue.get_nowait()
        await process.apply(wanted)


async def run_in_cluster(chosen: settings.Settings) -> None:
    """`hostint-agent run`."""
    from hostint_agent import cluster  # 40 MB that the standalone mode does not need

    queue: asyncio.Queue[agent.Wanted] = asyncio.Queue()
    async with cluster.connect(chosen.kubeconfig) as api:
        config = cluster.NodeConfig(api, chosen.node, queue.put_nowait)
        process = agent.Agent(chosen)
        writer = cluster.StatusWriter(config, process.status)
        process.on_status = config.on_seen = writer.poke
        await asyncio.to_thread(start, process)
        log.info("agent started", node=chosen.node, version=agent.VERSION)
        try:
            with process.serve():
                await _until_stopped(
                    config.watch(),
                    _apply_latest(process, queue),
                    writer.run(),
                    process.keep_time(),
                    watchdog.watch(),
                )
        finally:
            await asyncio.to_thread(process.stop)
            log.info("agent stopped, the datapath goes on", node=chosen.node)


async def run_standalone(
    chosen: settings.Settings, configuration: standalone.Configuration
) -> None:
    """`hostint-agent standalone`."""
    queue: asyncio.Queue[agent.Wanted] = asyncio.Queue()
    generations = itertools.count(1)

    def hand_over(spec: NodeConfigSpec) -> agent.Wanted:
        wanted = agent.Wanted(spec, next(generations))
        queue.put_nowait(wanted)
        return wanted

    await configuration.look_up()
    process = agent.Agent(chosen, hand_over(configuration.spec()))
    await asyncio.to_thread(start, process)
    try:
        with process.serve():
            log.info("agent started", node=chosen.node, version=agent.VERSION)
            await _until_stopped(
                configuration.follow(hand_over),
                _apply_latest(process, queue),
                process.keep_time(),
                watchdog.watch(),
            )
    finally:
        await asyncio.to_thread(process.stop)


def _run(options: argparse.Namespace) -> int:
    chosen = settings.from_options(options)
    ensure_bpffs(chosen.pin_dir)
    with _alone(chosen.pin_dir):
        asyncio.run(run_in_cluster(chosen))
    return 0


def _standalone(options: argparse.Namespace) -> int:
    chosen = settings.from_options(options)
    node_id = options.node_id
    if node_id is None:
        node_id = standalone.default_node_id(interfaces.read_network())
    configuration = standalone.Configuration(options.files, node_id)
    ensure_bpffs(chosen.pin_dir)
    with _alone(chosen.pin_dir) as directory:
        try:
            asyncio.run(run_standalone(chosen, configuration))
        finally:
            if not options.keep:
                _unload_ours(chosen.pin_dir, directory)
    return 0


def _unload_ours(pin_dir: Path, directory: int) -> None:
    """Unload, unless the pin directory was replaced and another agent works with the new one."""
    with contextlib.ExitStack() as stack:
        if not _is_at(pin_dir, directory):
            try:
                stack.enter_context(_alone(pin_dir))
            except StartError as error:
                log.warning("datapath not unloaded", error=str(error))
                return
        unload.unload(pin_dir)
        log.info("datapath unloaded")


def _check(options: argparse.Namespace) -> int:
    return check.run(options.files)


def _doctor(options: argparse.Namespace) -> int:
    from hostint_agent.doctor import command  # memory that no agent needs

    return command.run(options)


def _status(options: argparse.Namespace) -> int:
    from hostint_agent.status import command  # memory that no agent needs

    return command.run(options)


def _unload(options: argparse.Namespace) -> int:
    if options.pin_dir.is_dir():
        with _alone(options.pin_dir):
            removed = unload.unload(options.pin_dir)
    else:
        removed = unload.unload(options.pin_dir)
    print(*removed or ["nothing of ours is loaded"], sep="\n")  # noqa: T201
    return 0


def _counters(options: argparse.Namespace) -> int:
    maps = loader.current(options.pin_dir, options.bpf_dir) / "maps"
    try:
        opened = counters.Counters(maps)
    except bpf_calls.BpfError as error:
        raise StartError(f"no datapath is loaded at {options.pin_dir}: {error.strerror}") from error
    pending = opened.slots().pending
    watchlists = {
        str(i): c | {"pending": pending.get(i, 0)}
        for i in range(1, 256)
        if (c := opened.watchlist(i))["watched"]
    }
    names = kernel.drop_reason_names()
    told = {
        "watchlists": watchlists,
        "datapath": opened.datapath(),
        "drops": opened.drops(names),
        "drop_functions": opened.drop_functions(names),
    }
    print(json.dumps(told, indent=2))  # noqa: T201
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "standalone": _standalone,
    "check": _check,
    "doctor": _doctor,
    "status": _status,
    "unload": _unload,
    "counters": _counters,
}


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit status 0, 1 when it could not do its work, 2 for wrong usage."""
    options = command_line.parser(settings.environment()).parse_args(arguments)
    try:
        # before the event loop listens for it, SIGTERM ends us as Ctrl-C does: with what was loaded taken away again
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        logs.configure(
            getattr(options, "log_level", "info"), getattr(options, "log_format", "auto")
        )
        return _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        return 0
    except Exception as error:  # the last place; everything is told, nothing swallowed
        cause = _innermost(error)
        if isinstance(cause, StartError | ValueError | OSError) or (
            type(cause).__name__ in ("SetupError", "InvalidFiles")
        ):
            print(f"hostint-agent: {cause}", file=sys.stderr)  # noqa: T201
            return 1
        log.exception("agent failed", error=str(cause))
        return 1


if __name__ == "__main__":
    sys.exit(main())
