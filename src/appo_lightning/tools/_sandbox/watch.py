"""What a session uses as a whole, where the kernel limits parts: memory of all its processes, all its files."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

import files

_KIB_PER_MIB = 1024
MAX_FILES = 8192  # of a session


def over_memory(sessions: Collection[int], known: int, limit_mb: int) -> list[int]:
    """Sessions whose processes together use more memory than one may.

    Args:
        sessions: process ids of the first process of each.
        known: how many processes there are if no session started any: then the kernel's limit on each is enough.
        limit_mb: MiB, shared pages counted in part.
    """
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    if len(pids) <= known:
        return []
    members: dict[int, list[int]] = {}
    parents = {pid: parent for pid in pids if (parent := _parent(pid)) is not None}
    for pid in parents:
        ancestor = pid
        while ancestor not in sessions and ancestor in parents:
            ancestor = parents[ancestor]
        if ancestor in sessions:
            members.setdefault(ancestor, []).append(pid)
    # Two processes are a session at rest.
    grown = {first: pids for first, pids in members.items() if len(pids) > 2}
    return [first for first, pids in grown.items() if sum(map(_memory_kib, pids)) > limit_mb * _KIB_PER_MIB]


def over_disk(directories: Mapping[int, str], limit_mb: int) -> list[int]:
    """Sessions whose files together are larger, or more, than they may be.

    Args:
        directories: of each session.
        limit_mb: MiB.
    """
    found = []
    for session, directory in directories.items():
        used = 0
        for number, size in enumerate(files.sizes(directory)):
            used += size
            if number >= MAX_FILES or used > limit_mb << 20:
                found.append(session)
                break
    return found


def _parent(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command name is in brackets and may hold anything; after it: state, parent.
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None  # it ended


def _memory_kib(pid: int) -> int:
    """Memory of a process; pages that it shares count in part."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1])
    except (OSError, ValueError):
        pass  # it ended, or its memory cannot be read
    return 0
