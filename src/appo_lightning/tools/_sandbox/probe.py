"""The walls put to the test: a session tries what should be impossible, before any policy code runs.

What a kernel says that it can do is not what a container lets it do. So each protection counts only if the attempt to
get round it failed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from dataclasses import dataclass
from typing import Any

import libc

NETWORK, READING, WRITING, PROCESSES, PRIVILEGES, FORKING = (
    "no network",
    "no files of others to read",
    "no files to write but its own",
    "no other processes in reach",
    "no privileges",
    "a limit on processes",
)
ALL = (NETWORK, READING, WRITING, PROCESSES, PRIVILEGES, FORKING)


@dataclass(frozen=True, slots=True)
class Bait:
    """What a session must not reach, made by the server outside of the walls."""

    directory: str  # of the trainer's user, with a file "secret" and a "socket" that listens
    trainer: int  # process id outside
    port: int  # of 127.0.0.1 outside, where the server listens; 0: there is no network
    processes: str  # name of the process namespace outside


def lay(directory: str, trainer: int) -> tuple[Bait, list[socket.socket]]:
    """Put out the bait; the sockets listen until they are closed."""
    with open(f"{directory}/secret", "wb") as file:
        file.write(b"secret")
    local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    local.bind(f"{directory}/socket")
    local.listen()
    listening, port = [local], 0
    with contextlib.suppress(OSError):  # no network on this machine at all
        stream = socket.create_server(("127.0.0.1", 0))
        port = stream.getsockname()[1]
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listening += [stream, datagrams]
        datagrams.bind(("127.0.0.1", port))
    return Bait(directory, trainer, port, _process_namespace()), listening


def attempt(bait: Bait, limit: int) -> dict[str, bool]:
    """Try to get round each protection; whether it held. Leaves this process unfit for anything else.

    Args:
        bait: what to reach for.
        limit: on processes.
    """
    return {
        NETWORK: not any(
            (
                _can_connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", bait.port)),
                _can_connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", bait.port or 9)),
                _can_connect(socket.AF_UNIX, socket.SOCK_STREAM, f"{bait.directory}/socket"),
            )
        ),
        READING: not _can_open(f"{bait.directory}/secret", os.O_RDONLY)
        and not _can_open(f"/proc/{bait.trainer}/environ", os.O_RDONLY),
        WRITING: not _can_open(f"{bait.directory}/written", os.O_WRONLY | os.O_CREAT)
        and not _can_open(f"{bait.directory}/secret", os.O_RDONLY | os.O_TRUNC),
        PROCESSES: not _can_signal(bait),
        PRIVILEGES: _has_no_privileges(),
        FORKING: not _can_fork_beyond(limit),
    }


def _can_connect(family: int, kind: int, address: Any) -> bool:
    try:
        with socket.socket(family, kind) as attempt:
            attempt.settimeout(2)
            attempt.connect(address)
            attempt.send(b"x")
        return True
    except OSError:
        return False


def _can_open(path: str, flags: int) -> bool:
    try:
        os.close(os.open(path, flags))
        return True
    except OSError:
        return False


def _can_signal(bait: Bait) -> bool:
    if _process_namespace() not in ("", bait.processes):
        return False  # numbers mean other processes here
    try:
        os.kill(bait.trainer, 0)
        return True
    except OSError:
        return False


def _has_no_privileges() -> bool:
    try:
        return libc.process_option(libc.PR_GET_NO_NEW_PRIVS) == 1 and libc.effective_capabilities() == 0
    except OSError:
        return False


def _can_fork_beyond(limit: int) -> bool:
    # The limit is lowered to the processes that there are, one: cheaper than to start so many.
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if hard == resource.RLIM_INFINITY or hard > limit:
        limit = 0  # not counted apart: only a system that refuses every fork holds
    resource.setrlimit(resource.RLIMIT_NPROC, (min(1, limit) or hard, hard))
    try:
        pid = os.fork()
    except OSError:
        return False
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return True


def _process_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
