"""The fork server: a small, single-threaded interpreter that forks one process per session and buries it.

Run as a script. The trainer sends the channel of a new session over the control socket; from then on the trainer and
the session talk directly. The server keeps a copy of each channel for two reasons: when the trainer closes its end
the server kills the session, and when the session dies the server says how. When the trainer closes the control
socket or is gone, the server kills every session and ends.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

import frames
import limits as limits_module
import processes
import session

_CHECK_PARENT_MS = 5000
_BURIAL_S = 5.0


class ForkServer:
    """State of the running server.

    Args:
        control: socket to the trainer.
        directory: holds the working directories of the sessions; removed at the end.
        limits: of every session.
    """

    def __init__(self, control: socket.socket, directory: str, limits: limits_module.Limits) -> None:
        self._control, self._directory, self._limits = control, directory, limits
        self._trainer = os.getppid()
        self._sessions: dict[int, tuple[socket.socket, str]] = {}  # by process: channel, working directory
        self._owners: dict[int, int] = {}  # process by file number of its channel
        self._cleaners: set[int] = set()  # processes that remove a directory
        self._forked = 0
        self._poller = select.poll()
        self._wakeup = _wake_up_when_a_child_ends()

    def serve(self) -> None:
        """Fork and bury until the trainer hangs up."""
        self._poller.register(self._control, select.POLLIN)
        self._poller.register(self._wakeup, select.POLLIN)
        while os.getppid() == self._trainer:
            for fd, _ in self._poller.poll(_CHECK_PARENT_MS):
                if fd == self._wakeup:
                    os.read(self._wakeup, 4096)
                elif fd != self._control.fileno():
                    self._trainer_hung_up(fd)
                elif not self._accept():
                    return
            self._bury()

    def end(self) -> None:
        """Kill every session and what it started; remove the working directories."""
        deadline = time.monotonic() + _BURIAL_S
        for pid in self._sessions:
            processes.kill(pid)
        while time.monotonic() < deadline:
            self._bury()
            if not self._sessions and not processes.children_of_this_process():
                break
            time.sleep(0.002)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _accept(self) -> bool:
        """Fork the sessions that the trainer asks for; False when it hung up."""
        request, channels, _, _ = socket.recv_fds(self._control, 1, 1)
        for channel in channels:
            self._fork(socket.socket(fileno=channel))
        return bool(request)

    def _fork(self, channel: socket.socket) -> None:
        directory = f"{self._directory}/{self._forked}"
        self._forked += 1
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            _tell(channel, f"could not start: {error.strerror}")
            channel.close()
            return
        if pid == 0:
            _become_session(channel.fileno(), directory, self._limits, server)
        _lead_own_group(pid)
        self._sessions[pid] = channel, directory
        self._owners[channel.fileno()] = pid
        # No events asked for: only a hang-up is reported, never the traffic.
        self._poller.register(channel, 0)

    def _trainer_hung_up(self, fd: int) -> None:
        self._poller.unregister(fd)
        processes.kill(self._owners.pop(fd))

    def _bury(self) -> None:
        """Reap the dead, kill what they left running, tell the trainer."""
        buried = False
        while (pid := _next_dead_child()) is not None:
            buried = True
            if pid in self._sessions:
                # Before the number is given back: it still names the group.
                processes.kill(pid)
            _, status = os.waitpid(pid, 0)
            self._cleaners.discard(pid)
            if pid in self._sessions:
                self._close_session(pid, status)
        if buried:
            self._kill_orphans()

    def _close_session(self, pid: int, status: int) -> None:
        channel, directory = self._sessions.pop(pid)
        if self._owners.pop(channel.fileno(), None) is not None:
            self._poller.unregister(channel)
            _tell(channel, _how_it_ended(status))
        channel.close()
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
            shutil.rmtree(directory, ignore_errors=True)
            os._exit(0)
        self._cleaners.add(pid)

    def _kill_orphans(self) -> None:
        # Sessions adopt the orphans of their own descendants. What comes up to the server outlived its session.
        for pid in processes.children_of_this_process():
            if pid not in self._sessions and pid not in self._cleaners:
                processes.kill(pid)


def main() -> None:
    """Read the options, load what sessions share, serve."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    control = socket.socket(fileno=options["control_fd"])
    control.set_inheritable(False)
    _hide_own_modules()
    sys.path.extend(options["packages"])
    try:
        for name in options["preload"]:
            importlib.import_module(name)
    except Exception as error:
        frames.send(control, frames.REFUSED, 0, f"cannot import {name!r} ({error!r})".encode("utf-8", "replace"))
        return
    _allow_many_files()
    limits_module.adopt_orphans()
    # Forked processes share these objects' memory until a collector touches them.
    gc.disable()
    gc.freeze()
    server = ForkServer(control, options["directory"], limits_module.Limits(**options["limits"]))
    frames.send(control, frames.READY)
    try:
        server.serve()
    finally:
        server.end()


def _become_session(channel_fd: int, directory: str, limits: limits_module.Limits, server: int) -> NoReturn:
    try:
        session.run(channel_fd, directory, limits, server)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _lead_own_group(pid: int) -> None:
    # The child does the same; whoever is first, the group exists before it is needed.
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)


def _next_dead_child() -> int | None:
    """A child that ended and is not reaped yet."""
    try:
        dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if dead is None else dead.si_pid


def _how_it_ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


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
    for module in (frames, limits_module, processes, session):
        del sys.modules[module.__name__]


if __name__ == "__main__":
    main()
