"""The trainer's side of the fork server: starts it, asks it for sessions, replaces it when it is gone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appo_lightning.errors import ConfigurationError
from appo_lightning.tools._sandbox import files, frames, layout
from appo_lightning.tools._sandbox.protections import Protections

if TYPE_CHECKING:
    from appo_lightning.tools._sandbox.limits import Limits

_SCRIPT = Path(__file__).with_name("server.py")
_START_S = 60.0  # the preloaded modules may be large
_END_S = 10.0
WALLS = ("namespaces", "landlock", "seccomp")  # used where the machine has them


class ForkServer:
    """A process that forks interpreters; started when it is first needed.

    It is started fresh, with exec: nothing of the trainer's memory, open files or environment comes along.

    Args:
        limits: of every interpreter.
        packages: whether installed packages can be imported.
        preload: modules imported once, before any interpreter is forked.
        waiting: interpreters kept ready for sessions to come.
        allow_unsafe: run even where protections are missing.
        walls: kinds of walls that may be used.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        packages: bool,
        preload: Sequence[str],
        waiting: int,
        allow_unsafe: bool,
        walls: Sequence[str] = WALLS,
    ) -> None:
        directories = layout.package_directories() if packages else []
        self._allow_unsafe, self._walls = allow_unsafe, tuple(walls)
        self._options = {
            "limits": asdict(limits),
            "packages": directories,
            "readable": layout.readable_paths(directories),
            "preload": list(preload),
            "waiting": waiting,
        }
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def start(self) -> Protections:
        """Make sure that the server runs; what protects the trainer from it.

        Raises:
            ConfigurationError: it cannot start, for example because a preloaded module is missing; or a protection
                is missing.
        """
        with self._lock:
            return self._started().protections

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
            running = self._launched()
            if running.protections.missing and not self._allow_unsafe:
                running.stop()
                raise ConfigurationError(f"python tool: {running.protections.refusal()}")
            self._running = running
        return self._running

    def _launched(self) -> _Running:
        walls, lacks = self._walls, ""
        while True:
            try:
                return _Running({**self._options, "walls": walls}, lacks)
            except _NoNamespacesError as reason:
                walls, lacks = tuple(wall for wall in walls if wall != "namespaces"), str(reason)

    def _forget(self, running: _Running) -> None:
        running.stop()
        self._running = None


class _NoNamespacesError(Exception):
    """This machine does not let the server make namespaces; the message says why."""


class _Running:
    """One server process, from start to stop.

    Args:
        options: for the server.
        lacks: why it does without namespaces, or "".
    """

    def __init__(self, options: dict[str, Any], lacks: str) -> None:
        self._owner = os.getpid()
        directory = tempfile.mkdtemp(prefix="appo-python-")
        self.control, theirs = socket.socketpair()
        options = {**options, "control_fd": theirs.fileno(), "directory": directory}
        with theirs:
            self._process = subprocess.Popen(
                # No site module, no user packages, no bytecode files.
                [sys.executable, "-s", "-S", "-B", "-X", "utf8", str(_SCRIPT), json.dumps(options)],
                env=layout.clean_environment(),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        # Also when this object is forgotten, and at exit; at most once.
        self.stop = weakref.finalize(self, _stop, self._owner, self._process, self.control, directory)
        self.protections = Protections.from_report(self._report(), lacks)

    def is_alive(self) -> bool:
        """Whether this process can ask it for sessions: a forked copy of the trainer needs a server of its own."""
        return self._owner == os.getpid() and not _has_ended(self._process)

    def _report(self) -> dict[str, Any]:
        """Wait until the server is ready; what it says about its walls."""
        try:
            answer = frames.receive(self.control, 1 << 16, time.monotonic() + _START_S)
        except (EOFError, OSError, frames.BrokenFrame) as error:
            self.stop()
            raise ConfigurationError(
                f"python tool: expected an interpreter from {sys.executable}, found that it did not start ({error!r}); "
                "its own message is on the error stream"
            ) from error
        reason = answer.payload.decode("utf-8", "replace")
        if answer.kind == frames.LACKS:
            self.stop()
            raise _NoNamespacesError(reason)
        if answer.kind != frames.READY:
            self.stop()
            raise ConfigurationError(f"python tool: {reason}; install the module or take it out of preload")
        self.control.settimeout(None)
        return json.loads(answer.payload)


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
    process.wait()
    files.remove_tree(directory)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None
