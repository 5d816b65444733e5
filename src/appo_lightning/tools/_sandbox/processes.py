"""Finding and killing processes that policy code started. Linux only; elsewhere nothing is found."""

from __future__ import annotations

import contextlib
import os
import signal

_ATTEMPTS = 20  # a process may fork between the listing and its end


def kill(pid: int) -> None:
    """Kill a process and the group that it leads; no error if they are gone."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(pid, signal.SIGKILL)


def children_of_this_process() -> list[int]:
    """Process ids of the direct children, adopted orphans included."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def kill_members_of_session(session_id: int) -> None:
    """Kill every process of a kernel session except its leader.

    The caller holds the leader as an unreaped child, so that its number cannot have passed to another process.
    """
    for _ in range(_ATTEMPTS):
        members = [pid for pid in _all_processes() if pid != session_id and _session_of(pid) == session_id]
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _all_processes() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _session_of(pid: int) -> int | None:
    """Kernel session of a living process; None for a zombie or a process that is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The command name is in brackets and may hold anything; after it: state, parent, group, session.
            state, _, _, session = file.read().rpartition(")")[2].split()[:4]
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(session)
