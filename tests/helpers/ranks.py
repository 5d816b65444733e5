"""Run a function in several processes that know each other's rank, or in one that may be killed.

Processes come from a fork server: it imports the heavy libraries once and has run nothing since, so that threads, locks
and devices of the test process cannot get in the way.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

_PRELOAD = ["pytest", "peft", "transformers.models.qwen3.modeling_qwen3", "appo_lightning.callbacks"]


class RankFailure(AssertionError):
    """A process raised, died or did not come back in time; the message holds every traceback."""


def run_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 120.0) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes with the environment of a launcher.

    Args:
        function: importable by name; what it returns must be picklable without shared memory.
        args: picklable.
        world_size: processes.
        timeout: seconds for all of them together.

    Returns:
        The results by rank.

    Raises:
        RankFailure: see the class.
    """
    processes, pipes = _start(function, args, world_size)
    outcomes: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout
    failed_at = None
    try:
        while len(outcomes) < world_size:
            # After a failure the others may wait for it for ever: a few seconds for their own tracebacks, then stop.
            until = deadline if failed_at is None else min(deadline, failed_at + 5.0)
            remaining = until - time.monotonic()
            if remaining <= 0:
                break
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in outcomes]
            for ready in wait(waiting, remaining):
                rank = pipes.index(ready)  # type: ignore[arg-type]
                outcomes[rank] = _receive(ready, processes[rank])  # type: ignore[arg-type]
                if not outcomes[rank][0] and failed_at is None:
                    failed_at = time.monotonic()
    finally:
        for process in processes:
            process.join(5.0 if failed_at is None and len(outcomes) == world_size else 0.0)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in pipes:
            pipe.close()
    problems = [f"rank {rank}:\n{value}" for rank, (good, value) in sorted(outcomes.items()) if not good]
    problems += [f"rank {rank}: no answer" for rank in range(world_size) if rank not in outcomes]
    if problems:
        raise RankFailure("\n".join(problems))
    return [outcomes[rank][1] for rank in range(world_size)]


def run_until_killed(function: Callable[..., Any], *args: Any, world_size: int = 1, timeout: float = 120.0) -> None:
    """Call ``function(*args)``, which sends itself SIGKILL on some rank; the other ranks are killed with it.

    Raises:
        RankFailure: it came back, raised, or took too long.
    """
    processes, pipes = _start(function, args, world_size)
    try:
        wait([process.sentinel for process in processes], timeout)
        codes = [process.exitcode for process in processes]
        if -signal.SIGKILL not in codes:
            said = [_receive(pipe, process)[1] for pipe, process in zip(pipes, processes, strict=True) if pipe.poll()]
            raise RankFailure(f"expected a kill, exit codes are {codes}\n" + "\n".join(map(str, said)))
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def kill_oneself() -> None:
    """What the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def _start(
    function: Callable[..., Any], args: tuple[Any, ...], world_size: int
) -> tuple[list[BaseProcess], list[Connection]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    port = _free_port()
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        environment = {
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        process = context.Process(
            target=_entry, args=(function, args, environment if world_size > 1 else {}, theirs), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return processes, pipes


def _entry(function: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str], pipe: Connection) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    # A daemonic process may have no children; tools may need some.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()


def _receive(pipe: Connection, process: BaseProcess) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        process.join(5.0)
        return False, f"died without a word, exit code {process.exitcode}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def assert_raises_on_every_rank(message: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Every rank fails with an error that holds ``message``; none is left waiting for another."""
    with pytest.raises(RankFailure) as failure:
        run_ranks(function, *args, **options)
    said = str(failure.value)
    ranks = int(options.get("world_size", 2))
    assert said.count(message) >= ranks, said
    assert "no answer" not in said
