"""What stands between policy code and the machine: which walls this machine has, and how a session goes behind them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import landlock
import libc
import limits as limits_module
import namespaces
import seccomp

NAMESPACES, LANDLOCK, SECCOMP = "namespaces", "landlock", "seccomp"
_WRITABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full")


@dataclass(frozen=True, slots=True)
class Walls:
    """The walls of every session of a server."""

    readable: Sequence[str]  # files and directories of Python and the system
    namespaces: namespaces.SessionNamespaces | None
    landlock: int  # version of the interface; 0: not used
    seccomp: bool
    children: bool  # whether a session may start processes: only where they are counted and cannot leave it

    def may_start_processes(self) -> bool:
        """Whether sessions may: without a filter, nothing keeps them from it."""
        return self.children or not self.seccomp

    def names(self) -> list[str]:
        """The walls in words."""
        found = ["user, process, mount, network and IPC namespaces"] if self.namespaces else []
        if self.landlock:
            found.append(f"Landlock {self.landlock}")
        if self.seccomp:
            found.append("system call filter")
        return [*found, "resource limits"]


def find(wanted: Sequence[str], readable: Sequence[str], own: namespaces.SessionNamespaces | None) -> Walls:
    """The walls that this kernel offers.

    Args:
        wanted: names of those that may be used.
        readable: see ``Walls``.
        own: namespaces of sessions, if the server is inside such.
    """
    version = landlock.version() if LANDLOCK in wanted else 0
    if own is None and version < landlock.MINIMUM:
        version = 0
    has_filter = SECCOMP in wanted and seccomp.is_available()
    if has_filter:
        seccomp.build(None)  # once, for all sessions to come
    return Walls(readable, own, version, has_filter, children=own is not None)


def go_behind(walls: Walls, limits: limits_module.Limits, directory: str) -> None:
    """Shut this process in, for ever; in a new session, after its files are set up and before any policy code.

    Args:
        walls: of the server.
        limits: of the session.
        directory: the only one in which it may write.
    """
    if walls.namespaces is not None:
        walls.namespaces.change_user()
    limits_module.lower(limits, counted_apart=walls.namespaces is not None)
    if not libc.is_available():
        return
    libc.process_option(libc.PR_SET_NO_NEW_PRIVS, 1)
    libc.drop_capabilities()
    # The change of user turned it off; with it, the server can read how much memory the process uses.
    libc.process_option(libc.PR_SET_DUMPABLE, 1)
    if walls.landlock:
        if walls.namespaces is not None:
            # Whatever is there may be read; what may not is not there.
            landlock.restrict(["/"], [directory, "/dev/shm", *_WRITABLE_DEVICES])
        else:
            landlock.restrict([*walls.readable, *namespaces.DEVICES], [directory, *_WRITABLE_DEVICES])
    if walls.seccomp:
        seccomp.install(seccomp.build(None if walls.children else os.getpid()))
