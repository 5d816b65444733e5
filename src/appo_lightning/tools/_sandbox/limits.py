"""What an interpreter may use: limits of the kernel that policy code cannot raise."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass

_OPEN_FILES = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one session."""

    cpu_s: int  # CPU seconds of one call, for each process
    memory_mb: int  # MiB of address space of a process, and of memory of all together
    file_mb: int  # MiB of the largest file
    scratch_mb: int  # MiB of private files
    processes: int  # processes and threads at once
    output_bytes: int  # bytes of output kept of one call


def lower(limits: Limits, *, counted_apart: bool) -> None:
    """Apply every limit to this process and what it starts; ``cpu_s`` is applied call by call with ``allow_cpu``.

    Args:
        limits: of the session.
        counted_apart: whether the kernel counts this session's processes apart from all others.
    """
    # One byte, not none: only this value also keeps the kernel from starting the system's program for core dumps.
    _lower(resource.RLIMIT_CORE, 1)
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _lower(resource.RLIMIT_FSIZE, limits.file_mb << 20)
    _lower(resource.RLIMIT_AS, limits.memory_mb << 20)
    if counted_apart:
        _lower(resource.RLIMIT_NPROC, limits.processes)
    elif (threads := _threads_of_the_machine()) is not None:
        # The kernel counts all threads of the trainer's user. Does not bind root.
        _lower(resource.RLIMIT_NPROC, threads + limits.processes)


def prefer_as_out_of_memory_victim() -> None:
    """When the machine runs out of memory, the kernel should end policy code before the trainer."""
    try:
        with open("/proc/self/oom_score_adj", "wb") as file:
            file.write(b"1000")
    except OSError:
        pass  # not Linux


def allow_cpu(seconds: int) -> None:
    """Let this process use so many CPU seconds from now on; then the kernel ends it with SIGXCPU."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = math.ceil(usage.ru_utime + usage.ru_stime)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = used + seconds if hard == resource.RLIM_INFINITY else min(used + seconds, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(limit, (value, value))


def _threads_of_the_machine() -> int | None:
    try:
        # Bytes: a text file would load a codec, in every session anew.
        with open("/proc/loadavg", "rb") as file:
            return int(file.read().split()[3].split(b"/")[1])
    except (OSError, ValueError, IndexError):
        return None
