"""Ending processes, and closing what they inherit."""

from __future__ import annotations

import contextlib
import os
import signal

import libc


def kill(pid: int) -> None:
    """Kill a process and the group that it leads; no error if they are gone."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(pid, signal.SIGKILL)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    if libc.is_available():
        libc.process_option(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the line above.
    if os.getppid() != parent:
        os._exit(1)


def next_dead_child() -> int | None:
    """A child that ended and is not reaped yet: its number is still taken."""
    try:
        dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if dead is None else dead.si_pid


def how_it_ended(status: int) -> str:
    """What ``waitpid`` said, in words."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def close_files_from(first: int) -> None:
    """Close every open file with a number from ``first`` on."""
    for name in os.listdir("/dev/fd"):
        if int(name) >= first:
            # One of them was the listing itself.
            with contextlib.suppress(OSError):
                os.close(int(name))
