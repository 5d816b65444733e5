"""The fork server: a small, single-threaded interpreter that forks one process per session and buries it.

Run as a script. It goes behind walls of its own first, tries them, and says what held. A few sessions always wait
for work. The trainer sends the channel of a new session over the control socket; from then on the trainer and the
session talk directly. The server keeps a copy of each channel for two reasons: when the trainer closes its end the
server kills the session, and when the session dies the server says how. When the trainer closes the control socket
or is gone, the server kills every session and ends.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import files
import first
import frames
import landlock
import libc
import limits as limits_module
import namespaces
import nursery as nursery_module
import probe
import processes
import seccomp
import session
import state
import syscalls
import walls as walls_module
import watch

_CHECK_TRAINER_S = 5.0
_CHECK_USE_S = 0.2
_QUIET_S = 0.005  # before a session is made ready: it should not take a core from the one that just got work
_TRIES = 3  # to start a waiting session


class ForkServer:
    """State of the running server.

    Args:
        control: socket to the trainer.
        nursery: starts sessions.
        limits: of a session as a whole.
        waiting: sessions that wait for work.
    """

    def __init__(
        self, control: socket.socket, nursery: nursery_module.Nursery, limits: limits_module.Limits, waiting: int
    ) -> None:
        self._control, self._nursery, self._limits = control, nursery, limits
        self._wanted, self._failed = waiting, 0
        self._trainer = os.getppid()
        self._sessions: dict[int, nursery_module.Session] = {}  # by process
        self._waiting: list[nursery_module.Session] = []
        self._owners: dict[int, nursery_module.Session] = {}  # by file number of the channel
        self._cleaners: set[int] = set()  # processes that remove a directory
        self._next_check = 0.0
        self._poller = select.poll()
        self._wakeup = _wake_up_when_a_child_ends()

    def serve(self) -> None:
        """Fork and bury until the trainer hangs up."""
        self._poller.register(self._control, select.POLLIN)
        self._poller.register(self._wakeup, select.POLLIN)
        while os.getppid() == self._trainer:
            events = self._poller.poll(self._patience_ms())
            for fd, _ in events:
                if fd == self._wakeup:
                    os.read(self._wakeup, 4096)
                elif fd != self._control.fileno():
                    self._trainer_hung_up(fd)
                elif not self._accept():
                    return
            self._bury()
            if not events and self._lacks_waiting():
                self._start_waiting()
            if time.monotonic() > self._next_check:
                self._check_use()
                self._next_check = time.monotonic() + _CHECK_USE_S

    def end(self) -> None:
        """Kill every session."""
        for pid in (*self._sessions, *self._cleaners):
            processes.kill(pid)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()

    def _patience_ms(self) -> float:
        if self._lacks_waiting():
            return 1000 * _QUIET_S
        working = len(self._sessions) > len(self._waiting)
        return 1000 * (_CHECK_USE_S if working else _CHECK_TRAINER_S)

    def _check_use(self) -> None:
        """End the sessions that use too much as a whole."""
        if self._nursery.walls.namespaces is not None:
            known = 1 + 2 * len(self._sessions)
            greedy = watch.over_memory(self._sessions, known, self._limits.memory_mb)
            self._kill(greedy, f"more than {self._limits.memory_mb} MiB of memory")
        else:
            directories = {one.pid: one.directory for one in self._sessions.values() if one.channel and one.directory}
            greedy = watch.over_disk(directories, self._limits.scratch_mb)
            self._kill(greedy, f"more than {self._limits.scratch_mb} MiB, or {watch.MAX_FILES}, of files")

    def _kill(self, pids: Sequence[int], reason: str) -> None:
        for pid in pids:
            self._sessions[pid].reason = reason
            processes.kill(pid)

    def _lacks_waiting(self) -> bool:
        return len(self._waiting) < self._wanted and self._failed < _TRIES

    def _start_waiting(self) -> bool:
        try:
            newborn = self._nursery.start()
        except OSError as error:
            self._failed += 1
            print(f"python tool: cannot start a session: {error}", file=sys.stderr)
            return False
        self._sessions[newborn.pid] = newborn
        self._waiting.append(newborn)
        return True

    def _accept(self) -> bool:
        """Give work to the sessions that the trainer asks for; False when it hung up."""
        request, channels, _, _ = socket.recv_fds(self._control, 1, 1)
        for channel in channels:
            self._assign(socket.socket(fileno=channel))
        return bool(request)

    def _assign(self, channel: socket.socket) -> None:
        while self._waiting or self._start_waiting():
            chosen = self._waiting.pop(0)
            try:
                socket.send_fds(chosen.lifeline, [b"c"], [channel.fileno()])
            except OSError:
                continue  # it is dead; it will be buried
            chosen.channel = channel
            self._owners[channel.fileno()] = chosen
            # No events asked for: only a hang-up is reported, never the traffic.
            self._poller.register(channel, 0)
            return
        _tell(channel, "no process could be started")
        channel.close()

    def _trainer_hung_up(self, fd: int) -> None:
        self._poller.unregister(fd)
        processes.kill(self._owners.pop(fd).pid)

    def _bury(self) -> None:
        """Reap the dead; tell the trainer."""
        while (pid := processes.next_dead_child()) is not None:
            if pid in self._sessions:
                # Before the number is given back: it still names the group.
                processes.kill(pid)
            _, status = os.waitpid(pid, 0)
            self._cleaners.discard(pid)
            if pid in self._sessions:
                self._close_session(self._sessions.pop(pid), status)

    def _close_session(self, dead: nursery_module.Session, status: int) -> None:
        with dead.lifeline, contextlib.suppress(OSError):
            if len(told := dead.lifeline.recv(first.STATUS.size)) == first.STATUS.size:
                (status,) = first.STATUS.unpack(told)
        if dead.channel is None:
            self._failed += 1  # it never got so far as to wait
            with contextlib.suppress(ValueError):
                self._waiting.remove(dead)
        else:
            self._failed = 0
            if self._owners.pop(dead.channel.fileno(), None) is not None:
                self._poller.unregister(dead.channel)
                _tell(dead.channel, dead.reason or processes.how_it_ended(status))
            dead.channel.close()
        if dead.directory is not None:
            self._remove(dead.directory)

    def _remove(self, directory: str) -> None:
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            pass
        except OSError:
            self._remove_in_background(directory)

    def _remove_in_background(self, directory: str) -> None:
        # Policy code may leave many files; the next session should not wait for them.
        try:
            pid = os.fork()
        except OSError:
            return  # removed with everything else at the end
        if pid == 0:
            files.remove_tree(directory)
            os._exit(0)
        self._cleaners.add(pid)


def main() -> None:
    """Read the options, go behind walls, load what sessions share, serve."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    control = socket.socket(fileno=options["control_fd"])
    control.set_inheritable(False)
    directory, limits = options["directory"], limits_module.Limits(**options["limits"])
    bait, listening = probe.lay(directory, os.getppid())
    users = None
    if walls_module.NAMESPACES in options["walls"]:
        try:
            held_open = [held.fileno() for held in (control, *listening)]
            users = namespaces.enter(held_open, directory, options["readable"])
        except OSError as error:
            frames.send(control, frames.LACKS, 0, str(error).encode())
            return
    _hide_own_modules()
    sys.path.extend(options["packages"])
    if (problem := _preload(options["preload"])) is not None:
        frames.send(control, frames.REFUSED, 0, problem.encode("utf-8", "replace"))
        return
    _allow_many_files()
    # Forked processes share these objects' memory until a collector touches them.
    gc.disable()
    gc.freeze()
    own = None
    if users is not None:
        scratch = namespaces.scratch_directory(options["readable"])
        own = namespaces.SessionNamespaces(scratch, limits.scratch_mb, users)
    nursery = nursery_module.Nursery(directory, limits, walls_module.find(options["walls"], options["readable"], own))
    try:
        held = nursery.try_or_forbid_children(bait)
        report = {"held": held, "walls": nursery.walls.names(), "children": nursery.walls.may_start_processes()}
        frames.send(control, frames.READY, 0, json.dumps(report).encode())
        for bait_socket in listening:
            bait_socket.close()
        server = ForkServer(control, nursery, limits, options["waiting"])
        try:
            server.serve()
        finally:
            server.end()
    finally:
        files.remove_tree(directory)


def _preload(names: Sequence[str]) -> str | None:
    """Import modules; what went wrong."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            return f"cannot import {name!r} ({error!r})"
    return None


def _tell(channel: socket.socket, how: str) -> None:
    # The trainer may be gone, or not read.
    with contextlib.suppress(OSError):
        frames.send(channel, frames.ENDED, 0, how.encode(), flags=socket.MSG_DONTWAIT)


def _wake_up_when_a_child_ends() -> int:
    """A file that becomes readable when a child ends."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def _allow_many_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _hide_own_modules() -> None:
    # The directory of this script, and the plain names found in it, are no business of policy code.
    sys.path.pop(0)
    for module in (
        files,
        first,
        frames,
        landlock,
        libc,
        limits_module,
        namespaces,
        nursery_module,
        probe,
        processes,
        seccomp,
        session,
        state,
        syscalls,
        walls_module,
        watch,
    ):
        del sys.modules[module.__name__]


if __name__ == "__main__":
    main()
