"""A Python interpreter as a tool: one process per trajectory, with limits."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from appo_lightning.errors import ConfigurationError, ToolFailure
from appo_lightning.tools._sandbox import frames
from appo_lightning.tools._sandbox.client import ForkServer
from appo_lightning.tools._sandbox.limits import Limits
from appo_lightning.tools._sandbox.protections import Protections
from appo_lightning.tools.backends.base import InterpreterServer, Needs, PythonBackend
from appo_lightning.tools.base import Tool, ToolSession

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appo_lightning.types import Task

_MAX_CODE_CHARS = 1_000_000
_MAX_ERROR_BYTES = 8192
_WARM_SESSIONS = 4
_RESTARTED = "was restarted: its variables are lost."


class PythonTool(Tool):
    """Run Python code in a process of its own; variables live until the trajectory ends.

    The result is what the code printed, and the value of a last bare expression. Code that raises fails with its
    output and the last line of the traceback. ``random`` starts from seed 0, so that a branch that replays the calls
    of its prefix comes to the same values.

    Sessions are forked by a small server process that holds nothing of the trainer; the trainer is never forked.
    They run behind walls of the kernel (namespaces, Landlock, a filter of system calls, resource limits): no network,
    no files but Python's own and a private scratch directory, no processes but their own, and everything that a session
    started ends with it. The server tries each protection when it starts, says on one line what holds, and refuses to
    run where something is missing. ``docs/security.md`` says more.

    Args:
        timeout_s: wall-clock limit of one call, seconds. The interpreter is killed; the next call gets a new one.
        cpu_s: CPU limit of one call, whole seconds, for each process, all its threads together.
        memory_mb: address space of one process, and memory of all processes of a session together, MiB; preloaded
            modules count.
        max_output_chars: characters of output shown of one call; the rest is dropped, with a notice.
        file_mb: largest file that can be written, MiB.
        scratch_mb: all files of a session together, MiB.
        max_processes: processes and threads of a session at once.
        packages: whether installed packages (numpy, sympy) can be imported.
        preload: modules imported once by the server, so that no session waits for them, for example ``["sympy"]``.
        warm_sessions: processes kept ready for sessions to come; on this machine only.
        allow_unsafe: run even where a protection is missing, for code that you trust; on this machine only.
        backend: where the interpreters run instead: ``DockerBackend``, ``HTTPBackend``; None: on this machine.

    Raises:
        ConfigurationError: a limit is not positive; at a session's start also: the server cannot start, or a protection
            is missing.
    """

    name = "python"
    description = "Runs Python code and returns what it prints; variables are kept between calls."
    text_argument = "code"
    incidental = ("warm_sessions", "allow_unsafe")
    stateful = True

    def __init__(
        self,
        *,
        timeout_s: float = 10.0,
        cpu_s: int = 10,
        memory_mb: int = 1024,
        max_output_chars: int = 4000,
        file_mb: int = 16,
        scratch_mb: int = 64,
        max_processes: int = 32,
        packages: bool = True,
        preload: Sequence[str] = (),
        warm_sessions: int = _WARM_SESSIONS,
        allow_unsafe: bool = False,
        backend: PythonBackend | None = None,
    ) -> None:
        if not 0 < timeout_s < math.inf:
            raise ConfigurationError(f"timeout_s must be a positive number of seconds, got {timeout_s}")
        positive = {
            "cpu_s": cpu_s,
            "max_output_chars": max_output_chars,
            "file_mb": file_mb,
            "scratch_mb": scratch_mb,
            "max_processes": max_processes,
        }
        for option, value in positive.items():
            if value < 1:
                raise ConfigurationError(f"{option} must be at least 1, got {value}")
        if warm_sessions < 0:
            raise ConfigurationError(f"warm_sessions must be at least 0, got {warm_sessions}")
        if memory_mb < 64:
            raise ConfigurationError(
                f"memory_mb must be at least 64, which an empty interpreter needs, got {memory_mb}"
            )
        self.timeout_s, self.cpu_s, self.memory_mb = timeout_s, cpu_s, memory_mb
        self.max_output_chars, self.file_mb = max_output_chars, file_mb
        self.scratch_mb, self.max_processes = scratch_mb, max_processes
        self.packages, self.preload = packages, tuple(preload)
        if backend is not None and (allow_unsafe or warm_sessions != _WARM_SESSIONS):
            raise ConfigurationError(
                f"allow_unsafe and warm_sessions have no effect with backend = {type(backend).__name__}: leave them out"
                + (", or set backend.init_args.allow_unsafe" if _has_option(backend, "allow_unsafe") else "")
            )
        self.warm_sessions, self.allow_unsafe, self.backend = warm_sessions, allow_unsafe, backend
        self._reported = False
        self._server = self._new_server()

    def open(self, task: Task) -> ToolSession:
        # Here, so that a server that cannot start stops the run instead of failing every call.
        self.protections()
        return PythonSession(self)

    def protections(self) -> Protections:
        """What keeps policy code from the trainer, as tried at the start of the server, which this starts.

        Raises:
            ConfigurationError: the server cannot start, or a protection is missing.
        """
        found = self._server.start()
        if not self._reported and _is_first_rank():
            print(f"python tool: {found.line()}", file=sys.stderr)
        self._reported = True
        return found

    def close(self) -> None:
        self._server.close()

    def _new_server(self) -> InterpreterServer:
        limits = Limits(
            cpu_s=self.cpu_s,
            memory_mb=self.memory_mb,
            file_mb=self.file_mb,
            scratch_mb=self.scratch_mb,
            processes=self.max_processes,
            # UTF-8: enough bytes to know whether there were more characters than are shown.
            output_bytes=4 * self.max_output_chars + 1,
        )
        if self.backend is not None:
            return self.backend.serve(Needs(limits, self.timeout_s, self.packages, self.preload))
        return ForkServer(
            limits,
            packages=self.packages,
            preload=self.preload,
            waiting=self.warm_sessions,
            allow_unsafe=self.allow_unsafe,
        )

    def __getstate__(self) -> dict[str, Any]:
        # Copies and worker processes start a server of their own.
        return {key: value for key, value in vars(self).items() if key != "_server"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._server = self._new_server()


class PythonSession(ToolSession):
    """One interpreter; its process is started at the first call, and again after it was killed."""

    def __init__(self, tool: PythonTool) -> None:
        self._tool = tool
        self._number = 0
        self._channel: socket.socket | None = None
        # interrupt() and close() come from other threads.
        self._lock = threading.Lock()
        self._running = self._interrupted = self._closed = False

    def call(self, argument: str) -> str:
        if len(argument) > _MAX_CODE_CHARS:
            raise ToolFailure(
                f"expected at most {_MAX_CODE_CHARS} characters of code, got {len(argument)}", "malformed"
            )
        self._start_call()
        self.state_digest = ""
        try:
            # Half a surrogate pair is no text; let the interpreter say so.
            output, self.state_digest, error = self._exchange(argument.encode("utf-8", "surrogatepass"))
        except TimeoutError:
            self._drop_interpreter()
            raise self._timeout(f"no result within {self._tool.timeout_s:g} s") from None
        except _Ended as ended:
            self._drop_interpreter()
            raise self._explain(ended.how) from None
        finally:
            self._end_call()
        shown = self._shown(output)
        if error:
            raise ToolFailure(f"{shown}\n{error}" if shown else error)
        return shown

    def interrupt(self) -> None:
        with self._lock:
            if self._running:
                self._interrupted = True
                self._hang_up()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._running:
                # The call that waits on the channel closes it.
                self._hang_up()
                return
        self._drop_interpreter()

    def _start_call(self) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("call() on a closed session: open a new one")
            self._running, self._interrupted = True, False

    def _end_call(self) -> None:
        with self._lock:
            self._running = False
            closed = self._closed
        if closed:
            self._drop_interpreter()

    def _exchange(self, code: bytes) -> tuple[bytes, str, str]:
        """Send one call and wait for its output, the digest of the state behind it, and its error line."""
        channel = self._connected()
        # Not before: the first session of a run waits for the server, and that is not the policy's time.
        deadline = time.monotonic() + self._tool.timeout_s
        self._number += 1
        try:
            channel.settimeout(self._tool.timeout_s)
            frames.send(channel, frames.CODE, self._number, code)
        except TimeoutError:
            raise
        except OSError:
            pass  # it died between two calls; what the server said about it can still be read
        output = self._receive(channel, frames.OUTPUT, deadline)
        state = self._receive(channel, frames.STATE, deadline)
        error = self._receive(channel, frames.DONE, deadline)
        return output, state.decode("utf-8", "replace"), error.decode("utf-8", "replace")

    def _connected(self) -> socket.socket:
        if self._channel is None:
            channel = self._tool._server.connect()
            with self._lock:
                self._channel = channel
                if self._interrupted or self._closed:
                    self._hang_up()
        assert self._channel is not None
        return self._channel

    def _receive(self, channel: socket.socket, kind: int, deadline: float) -> bytes:
        try:
            largest = 4 * self._tool.max_output_chars + _MAX_ERROR_BYTES
            frame = frames.receive(channel, largest, deadline)
            while 0 < frame.number < self._number:
                # Policy code answered in the interpreter's place; what that said later belongs to a call long over.
                frame = frames.receive(channel, largest, deadline)
        except TimeoutError:
            raise
        except (EOFError, OSError):
            raise _Ended("killed from outside") from None
        except frames.BrokenFrame:
            raise _Ended("it wrote into its own channel") from None
        if frame.kind == frames.ENDED:
            raise _Ended(frame.payload.decode("utf-8", "replace"))
        if (frame.kind, frame.number) != (kind, self._number):
            raise _Ended("it wrote into its own channel")
        return frame.payload

    def _explain(self, how: str) -> ToolFailure:
        if self._interrupted or self._closed:
            return self._timeout("stopped before it finished")
        if how == "SIGXCPU":
            return self._timeout(f"more than {self._tool.cpu_s} s of CPU time")
        return ToolFailure(f"The interpreter ended ({how}) and {_RESTARTED}")

    def _timeout(self, reason: str) -> ToolFailure:
        return ToolFailure(f"TimeoutError: {reason}. The interpreter {_RESTARTED}", "timeout")

    def _shown(self, output: bytes) -> str:
        text, limit = output.decode("utf-8", "replace"), self._tool.max_output_chars
        return text.rstrip("\n") if len(text) <= limit else f"{text[:limit]}\n[output cut after {limit} characters]"

    def _hang_up(self) -> None:
        """Wake the waiting call; the server sees it too and kills the process. Call with the lock held."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)

    def _drop_interpreter(self) -> None:
        with self._lock:
            if self._channel is not None:
                self._channel.close()
                self._channel = None


def _has_option(backend: PythonBackend, name: str) -> bool:
    return name in inspect.signature(type(backend)).parameters


def _is_first_rank() -> bool:
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


class _Ended(Exception):
    """The interpreter's process is gone, or can no longer be understood."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how
