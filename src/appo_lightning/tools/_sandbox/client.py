"""The trainer's side of the fork server: starts it, asks it for sessions, replaces it when it is gone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from appo_lightning.errors import ConfigurationError
from appo_lightning.tools._sandbox import frames, processes
from appo_lightning.tools._sandbox.limits import Limits

_SCRIPT = Path(__file__).with_name("server.py")
_START_S = 60.0  # the preloaded modules may be large
_END_S = 10.0


class ForkServer:
    """A process that forks interpreters; started when it is first needed.

    It is started fresh, with exec: nothing of the trainer's memory, open files or environment comes along.

    Args:
        limits: of every interpreter.
        packages: whether installed packages can be imported.
        preload: modules imported once, before any interpreter is forked.
    """

    def __init__(self, limits: Limits, *, packages: bool, preload: Sequence[str]) -> None:
        self._limits, self._packages, self._preload = limits, packages, list(preload)
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def start(self) -> None:
        """Make sure that the server runs.

        Raises:
            ConfigurationError: it cannot start, for example because a preloaded module is missing.
        """
        with self._lock:
            self._started()

    def connect(self) -> socket.socket:
        """Fork an interpreter; returns at once. Closing the socket kills it.

        Raises:
            ConfigurationError: as ``start``.
        """
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            try:
                self._request(theirs)
            except OSError:
                # Policy code can kill its parent, the server: the next session starts a new one.
                self._request(theirs)
        return ours

    def close(self) -> None:
        """End the server and every interpreter; returns when they are gone. Safe to call twice."""
        with self._lock:
            if self._running is not None:
                self._forget(self._running)

    def _request(self, channel: socket.socket) -> None:
        running = self._started()
        try:
            socket.send_fds(running.control, [b"f"], [channel.fileno()])
        except OSError:
            self._forget(running)
            raise

    def _started(self) -> _Running:
        if self._running is not None and not self._running.is_alive():
            self._forget(self._running)
        if self._running is None:
            self._running = _Running(self._limits, self._packages, self._preload)
        return self._running

    def _forget(self, running: _Running) -> None:
        running.stop()
        self._running = None


class _Running:
    """One server process, from start to stop."""

    def __init__(self, limits: Limits, packages: bool, preload: list[str]) -> None:
        self._owner = os.getpid()
        directory = tempfile.mkdtemp(prefix="appo-python-")
        self.control, theirs = socket.socketpair()
        options = {
            "control_fd": theirs.fileno(),
            "directory": directory,
            "limits": asdict(limits),
            "packages": _package_directories() if packages else [],
            "preload": preload,
        }
        with theirs:
            self._process = subprocess.Popen(
                # No site module, no user packages, no bytecode files.
                [sys.executable, "-s", "-S", "-B", "-X", "utf8", str(_SCRIPT), json.dumps(options)],
                env=_clean_environment(),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        # Also when this object is forgotten, and at exit; at most once.
        self.stop = weakref.finalize(self, _stop, self._owner, self._process, self.control, directory)
        self._wait_until_ready()

    def is_alive(self) -> bool:
        """Whether this process can ask it for sessions: a forked copy of the trainer needs a server of its own."""
        return self._owner == os.getpid() and not _has_ended(self._process)

    def _wait_until_ready(self) -> None:
        try:
            answer = frames.receive(self.control, 1 << 16, time.monotonic() + _START_S)
        except (EOFError, OSError, frames.BrokenFrame) as error:
            self.stop()
            raise ConfigurationError(
                f"python tool: expected an interpreter from {sys.executable}, found that it did not start ({error!r}); "
                "its own message is on the error stream"
            ) from error
        if answer.kind != frames.READY:
            self.stop()
            reason = answer.payload.decode("utf-8", "replace")
            raise ConfigurationError(f"python tool: {reason}; install the module or take it out of preload")
        self.control.settimeout(None)


def _stop(owner: int, process: subprocess.Popen[bytes], control: socket.socket, directory: str) -> None:
    """End a server and everything it started."""
    control.close()
    if owner != os.getpid():
        return  # a forked copy of the trainer: the server is not its own
    deadline = time.monotonic() + _END_S
    while not _has_ended(process):
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(0.001)
    # If it was killed, its sessions died with it, but perhaps not what those had started.
    processes.kill_members_of_session(process.pid)
    process.wait()
    shutil.rmtree(directory, ignore_errors=True)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    # Without reaping it: its process id must stay taken until the members of its session are gone.
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _clean_environment() -> dict[str, str]:
    """What an interpreter needs and nothing that the trainer knows."""
    environment = {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        # The order of sets of texts should not change from run to run.
        "PYTHONHASHSEED": "0",
        # Numerical libraries start a thread per core otherwise: in every session.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    # Some installations find libpython only with it.
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def _package_directories() -> list[str]:
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))
