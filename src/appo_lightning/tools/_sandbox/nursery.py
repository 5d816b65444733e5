"""Sessions from birth to work: forked, put behind walls, ready."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import traceback
from dataclasses import dataclass
from typing import NoReturn

import files
import first
import limits as limits_module
import probe
import processes
import session
from walls import Walls

_PROBE_S = 20.0


@dataclass(slots=True)
class Session:
    """One session as the server sees it."""

    pid: int  # its first process
    lifeline: socket.socket
    directory: str | None  # to remove; None: its files end with it
    channel: socket.socket | None = None  # None: it waits for work
    reason: str = ""  # why the server killed it


class Nursery:
    """Starts sessions.

    Args:
        directory: holds their working directories where they have no private file system.
        limits: of every session.
        walls: around every session.
    """

    def __init__(self, directory: str, limits: limits_module.Limits, walls: Walls) -> None:
        self.walls = walls
        self._directory, self._limits = directory, limits
        self._started = 0

    def start(self, bait: probe.Bait | None = None) -> Session:
        """Fork a session, which waits for its channel, or tries its walls on the bait.

        Raises:
            OSError: no process can be started.
        """
        self._started += 1
        ours, theirs = socket.socketpair()
        own, server = self.walls.namespaces, os.getpid()
        directory = own.scratch if own else f"{self._directory}/{self._started}"
        with theirs:
            try:
                pid = os.fork() if own is None else own.fork()
            except OSError:
                ours.close()
                raise
            if pid == 0:
                ours.close()
                self._become_session(theirs, directory, server, bait)
        ours.setblocking(False)
        return Session(pid, ours, None if own else directory)

    def try_walls(self, bait: probe.Bait) -> dict[str, bool]:
        """Which protections hold, by what a session could do; none if it did not get so far."""
        tester = self.start(bait)
        tester.lifeline.settimeout(_PROBE_S)
        answer = b""
        with contextlib.suppress(OSError), tester.lifeline:
            while not answer.endswith(b"\n") and (part := tester.lifeline.recv(1)):
                answer += part
        processes.kill(tester.pid)
        os.waitpid(tester.pid, 0)
        if tester.directory is not None:
            files.remove_tree(tester.directory)
        return json.loads(answer) if answer.endswith(b"\n") else dict.fromkeys(probe.ALL, False)

    def try_or_forbid_children(self, bait: probe.Bait) -> dict[str, bool]:
        """As ``try_walls``; where the kernel does not count a session's processes apart, sessions get none."""
        held = self.try_walls(bait)
        if self.walls.children and self.walls.seccomp and not held[probe.FORKING]:
            self.walls = dataclasses.replace(self.walls, children=False)
            held = self.try_walls(bait)
        return held

    def _become_session(
        self, lifeline: socket.socket, directory: str, server: int, bait: probe.Bait | None
    ) -> NoReturn:
        def interpreter() -> NoReturn:
            try:
                session.run(lifeline, directory, self._limits, self.walls, bait)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)

        try:
            limits_module.prefer_as_out_of_memory_victim()
            if self.walls.namespaces is not None:
                first.run(interpreter, lifeline, self.walls.namespaces)
            os.setpgid(0, 0)
            processes.end_with_parent(server)
            os.mkdir(directory, 0o700)
            interpreter()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
