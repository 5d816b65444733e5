"""Interpreters in a container: walls around the walls, or other packages than the trainer's.

The container has no network, no privileges, a read-only root and limits of its own; inside, the sandbox runs as it does
outside, so that sessions are also kept from each other. One container serves all sessions of a tool.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

import appo_lightning
from appo_lightning.errors import ConfigurationError
from appo_lightning.tools._sandbox import frames
from appo_lightning.tools._sandbox.protections import Protections
from appo_lightning.tools.backends.base import Needs, PythonBackend
from appo_lightning.tools.backends.multiplexer import Multiplexer

_PACKAGE = Path(appo_lightning.__file__).parent
_INSIDE = "/opt/appo"
_SCRATCH = "/appo-scratch"  # not /tmp: a directory of the image gives the mount its own mode, whoever may write there
_START_S = 300.0  # an image may have to be fetched
_END_S = 10.0
_MAX_SAID_CHARS = 300


class DockerBackend(PythonBackend):
    """Run the interpreters in a container.

    Args:
        image: with Python 3.11 or newer; its packages are those of the interpreters.
        engine: the program: ``docker``, or one that takes the same options, as ``podman``.
        python: the interpreter inside the image.
        memory_mb: memory of the whole container, MiB.
        cpus: processors of the whole container.
        max_processes: of the whole container.
        tmp_mb: scratch files of all sessions together, MiB.
        runtime: another container runtime, for example ``runsc`` of gVisor; "": the engine's default.
    """

    def __init__(
        self,
        image: str = "python:3.11-slim",
        engine: str = "docker",
        python: str = "python3",
        memory_mb: int = 8192,
        cpus: float = 2.0,
        max_processes: int = 1024,
        tmp_mb: int = 1024,
        runtime: str = "",
    ) -> None:
        for option, value in (("memory_mb", memory_mb), ("max_processes", max_processes), ("tmp_mb", tmp_mb)):
            if value < 1:
                raise ConfigurationError(f"backend.{option} must be at least 1, got {value}")
        if not cpus > 0:
            raise ConfigurationError(f"backend.cpus must be positive, got {cpus}")
        self.image, self.engine, self.python, self.runtime = image, engine, python, runtime
        self.memory_mb, self.cpus, self.max_processes, self.tmp_mb = memory_mb, cpus, max_processes, tmp_mb

    def serve(self, needs: Needs) -> ContainerServer:
        if needs.limits.memory_mb > self.memory_mb:
            raise ConfigurationError(
                f"backend.memory_mb must hold at least one session of memory_mb = {needs.limits.memory_mb}, "
                f"got {self.memory_mb}"
            )
        return ContainerServer(self, needs)

    def command(self, needs: Needs, name: str) -> list[str]:
        """The engine's command line.

        Args:
            needs: of the tool.
            name: of the container.
        """
        options = {
            "limits": asdict(needs.limits),
            "packages": needs.packages,
            "preload": list(needs.preload),
            "waiting": 4,
        }
        return [
            *(self.engine, "run", "--rm", "--interactive", "--init", "--name", name),
            *(("--runtime", self.runtime) if self.runtime else ()),
            *("--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--user", "65534:65534", "--ipc", "none"),
            *("--memory", f"{self.memory_mb}m", "--memory-swap", f"{self.memory_mb}m"),
            *("--cpus", f"{self.cpus:g}", "--pids-limit", str(self.max_processes)),
            *("--tmpfs", f"{_SCRATCH}:rw,nosuid,nodev,mode=1777,size={self.tmp_mb}m", "--env", f"TMPDIR={_SCRATCH}"),
            *("--volume", f"{_PACKAGE}:{_INSIDE}/{_PACKAGE.name}:ro", "--env", f"PYTHONPATH={_INSIDE}"),
            *("--env", "PYTHONDONTWRITEBYTECODE=1"),
            *(self.image, self.python, "-m", "appo_lightning.tools.backends.relay", json.dumps(options)),
        ]


class ContainerServer:
    """One container; started when it is first needed, and again when it has ended.

    Args:
        backend: how to run it.
        needs: of the tool.
    """

    def __init__(self, backend: DockerBackend, needs: Needs) -> None:
        self._backend, self._needs = backend, needs
        self._lock = threading.Lock()
        self._running: _Container | None = None

    def start(self) -> Protections:
        with self._lock:
            return self._started().protections

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with self._lock:
            self._started().multiplexer.add(theirs)
        return ours

    def close(self) -> None:
        with self._lock:
            if self._running is not None:
                self._running.stop()
                self._running = None

    def _started(self) -> _Container:
        if self._running is not None and not self._running.is_alive():
            self._running.stop()
            self._running = None
        if self._running is None:
            name = f"appo-python-{secrets.token_hex(6)}"
            self._running = _Container(self._backend.engine, name, self._backend.command(self._needs, name))
        return self._running


class _Container:
    """A container from start to stop."""

    def __init__(self, engine: str, name: str, command: Sequence[str]) -> None:
        self._owner, self._engine = os.getpid(), engine
        stream, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as messages:
            both = theirs.fileno()
            try:
                self._process = subprocess.Popen(
                    command, stdin=both, stdout=both, stderr=messages, start_new_session=True
                )
            except OSError as error:
                stream.close()
                raise ConfigurationError(
                    f"python tool: expected the container engine {engine!r} on this machine, found that it cannot be "
                    f"run ({error.strerror}); install it, name another in backend.init_args.engine, or leave backend "
                    "out"
                ) from error
            theirs.close()  # or the end of the process would go unseen
            # Also when this object is forgotten, and at exit; at most once.
            self.stop = weakref.finalize(self, _stop, self._owner, self._process, stream, engine, name)
            self.protections = self._report(stream, messages)
        self.multiplexer = Multiplexer(stream.fileno(), os.dup(stream.fileno()))
        threading.Thread(target=self.multiplexer.run, daemon=True, name="appo-container").start()

    def is_alive(self) -> bool:
        """Whether this process can ask it for sessions."""
        # Its stream ends a moment before its process does.
        return self._owner == os.getpid() and not self.multiplexer.ended and self._process.poll() is None

    def _report(self, stream: socket.socket, messages: IO[bytes]) -> Protections:
        try:
            answer = frames.receive(stream, 1 << 16, time.monotonic() + _START_S)
        except (EOFError, OSError, frames.BrokenFrame):
            self.stop()
            messages.seek(0)
            said = _told(messages.read().decode("utf-8", "replace"))
            raise ConfigurationError(
                f"python tool: expected a container from {self._engine!r}, found that none started "
                f"({said or 'it said nothing'}); start the engine, or correct backend.init_args"
            ) from None
        text = answer.payload.decode("utf-8", "replace")
        if answer.kind != frames.READY:
            self.stop()
            raise ConfigurationError(text)
        return Protections.from_service(json.loads(text), f"in a container of {self._engine}")


def _told(messages: str) -> str:
    """On one line; of a traceback only what went wrong."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        del lines[:-1]
    return " ".join(lines)[:_MAX_SAID_CHARS]


def _stop(owner: int, process: subprocess.Popen[bytes], stream: socket.socket, engine: str, name: str) -> None:
    """End a container: the relay inside ends with its input."""
    if owner != os.getpid():
        stream.close()
        return  # a forked copy of the trainer: the container is not its own
    # Not close(): the thread that reads must see the end.
    with contextlib.suppress(OSError):  # it hung up first
        stream.shutdown(socket.SHUT_RDWR)
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        subprocess.run([engine, "kill", name], capture_output=True, check=False)
        process.kill()
        process.wait()
    stream.close()
