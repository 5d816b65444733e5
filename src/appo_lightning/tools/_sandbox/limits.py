"""What an interpreter may use: limits of the kernel that policy code cannot raise, or only at its own cost.

The place for further walls (seccomp filters, namespaces, another user) is ``confine``: it runs in the new process,
after its files are set up and before any policy code.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
from dataclasses import dataclass

_OPEN_FILES = 64
_MORE_PROCESSES = 64
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one interpreter."""

    cpu_s: int  # CPU seconds of one call
    memory_mb: int  # MiB of address space
    file_mb: int  # MiB of the largest file
    output_bytes: int  # bytes of output kept of one call


def confine(limits: Limits, parent: int) -> None:
    """Apply every limit to this process and what it starts.

    Args:
        limits: see ``Limits``; ``cpu_s`` is applied call by call with ``allow_cpu``.
        parent: process id of the fork server; this process ends with it.
    """
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _lower(resource.RLIMIT_FSIZE, limits.file_mb << 20)
    _lower(resource.RLIMIT_AS, limits.memory_mb << 20)
    if (threads := _threads_of_the_machine()) is not None:
        # The kernel counts a user's threads, the trainer's among them, and does not count root's at all: against
        # fork bombs this helps only runs without root.
        _lower(resource.RLIMIT_NPROC, threads + _MORE_PROCESSES)
    _prefer_as_out_of_memory_victim()
    set_process_option(_PR_SET_NO_NEW_PRIVS, 1)
    adopt_orphans()
    set_process_option(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The server may have died before the line above.
    if os.getppid() != parent:
        os._exit(1)


def allow_cpu(seconds: int) -> None:
    """Let this process use so many CPU seconds from now on; then the kernel ends it with SIGXCPU."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = math.ceil(usage.ru_utime + usage.ru_stime)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = used + seconds if hard == resource.RLIM_INFINITY else min(used + seconds, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose parent ends, so that none escapes it unseen."""
    set_process_option(_PR_SET_CHILD_SUBREAPER, 1)


def set_process_option(option: int, value: int) -> None:
    """``prctl(option, value)`` where the system has it."""
    if _libc is not None:
        _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


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


def _prefer_as_out_of_memory_victim() -> None:
    # When the machine runs out of memory, the kernel should end policy code before the trainer.
    try:
        with open("/proc/self/oom_score_adj", "wb") as file:
            file.write(b"1000")
    except OSError:
        pass
