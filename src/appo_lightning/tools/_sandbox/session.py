"""One interpreter: runs source texts one after the other in one namespace, like an interactive console."""

from __future__ import annotations

import ast
import builtins
import contextlib
import fcntl
import gc
import io
import json
import os
import random
import signal
import socket
import sys
import tempfile
import textwrap
import types
from typing import Any, NoReturn

import frames
import limits as limits_module
import probe
import processes
import state
from limits import Limits
from probe import Bait
from walls import Walls, go_behind

_CHANNEL, _OUTPUT = 3, 4  # file numbers beside the three standard ones
_MAX_CODE_BYTES = 1 << 22
_MAX_ERROR_CHARS = 1000
_SOURCE = "<python>"


def run(lifeline: socket.socket, directory: str, limits: Limits, walls: Walls, bait: Bait | None) -> NoReturn:
    """Go behind the walls, wait for a trajectory, serve its calls until the other end closes the channel.

    Never returns into the server's stack.

    Args:
        lifeline: to the server, which sends the channel to the trainer through it.
        directory: the working directory.
        limits: what the process may use.
        walls: of the server.
        bait: try the walls on it and say how they held, instead.
    """
    _default_signals()
    os.chdir(directory)
    _private_environment(directory)
    _private_files(lifeline.detach())
    go_behind(walls, limits, directory)
    lifeline = socket.socket(fileno=_CHANNEL)
    if bait is not None:
        lifeline.sendall(json.dumps(probe.attempt(bait, limits.processes)).encode() + b"\n")
        os._exit(0)
    _same_random_numbers_in_every_session()
    output = _BoundedOutput(limits.output_bytes)
    _rehearse(output)
    gc.enable()
    _serve(_channel(lifeline), limits, output)


def _channel(lifeline: socket.socket) -> socket.socket:
    """Wait for the channel; it takes the place of the lifeline, which policy code must not find."""
    _, channels, _, _ = socket.recv_fds(lifeline, 1, 1)
    if not channels:
        os._exit(0)
    os.dup2(channels[0], _CHANNEL, inheritable=False)
    os.close(channels[0])
    lifeline.detach()
    return socket.socket(fileno=_CHANNEL)


def _rehearse(output: _BoundedOutput) -> None:
    # The first call of a forked process copies the memory that it touches: better now than while somebody waits.
    output.start()
    _evaluate(b"print(end=''); None", {})
    output.take()


def _serve(channel: socket.socket, limits: Limits, output: _BoundedOutput) -> NoReturn:
    this_process = os.getpid()
    scope = _fresh_main()
    while True:
        try:
            request = frames.receive(channel, _MAX_CODE_BYTES)
        except EOFError:
            os._exit(0)
        _allow_cpu(limits.cpu_s)
        output.start()
        error = _evaluate(request.payload, scope)
        if os.getpid() != this_process:
            # Policy code forked, and this copy came home: only the original answers.
            os._exit(0)
        answer = (
            (frames.OUTPUT, output.take()),
            (frames.STATE, state.digest(scope).encode()),
            (frames.DONE, error.encode("utf-8", "replace")),
        )
        # As one write, so that whoever waits wakes once.
        channel.sendall(b"".join(frames.pack(kind, request.number, payload) for kind, payload in answer))


def _evaluate(code: bytes, scope: dict[str, Any]) -> str:
    """Run a source text; the error as one line, or ""."""
    try:
        # In a tag, code is often indented as a whole, or starts with the blank after the tag.
        source = textwrap.dedent(code.decode("utf-8", "surrogatepass")).strip()
        tree = ast.parse(source, _SOURCE)
        # "single" prints the value as the interactive console does.
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, _SOURCE, "exec", dont_inherit=True), scope)
        if last is not None:
            exec(compile(ast.Interactive([last]), _SOURCE, "single", dont_inherit=True), scope)
    except SystemExit as exit_request:
        return "" if exit_request.code in (None, 0) else _describe(exit_request)
    except BaseException as error:
        return _describe(error)
    return ""


def _describe(error: BaseException) -> str:
    """The last line of the traceback, as the interpreter would print it."""
    kind = type(error)
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    try:
        text = str(error)
    except BaseException:
        text = "<its text cannot be shown>"
    line = f"{name}: {text}" if text else name
    return line if len(line) <= _MAX_ERROR_CHARS else line[:_MAX_ERROR_CHARS] + " …"


class _BoundedOutput(io.RawIOBase):
    """What one call prints, through ``sys.stdout``, ``sys.stderr`` or the files 1 and 2; kept up to a limit.

    Python's own prints stop being stored at the limit; what programs write to the files 1 and 2 is bounded by the
    limit on file sizes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._written = 0

    def start(self) -> None:
        """Begin a call: new streams, because the last call may have closed or replaced them."""
        self._written = 0
        sys.displayhook = sys.__displayhook__
        sys.stdout = sys.__stdout__ = self._stream()  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = self._stream()  # type: ignore[misc]

    def take(self) -> bytes:
        """End a call: what was printed."""
        printed = os.pread(_OUTPUT, self._limit, 0)
        os.ftruncate(_OUTPUT, 0)
        return printed

    def _stream(self) -> io.TextIOWrapper:
        # Written through, so that prints and the output of programs appear in the order they happened.
        return io.TextIOWrapper(self, encoding="utf-8", errors="backslashreplace", write_through=True)  # type: ignore[arg-type]

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if (room := self._limit - self._written) > 0:
            # Programs may have filled the file; it is longer than what is shown, then.
            with contextlib.suppress(OSError):
                os.write(_OUTPUT, view[:room])
        self._written += len(view)
        return len(view)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def close(self) -> None:
        pass


def _fresh_main() -> dict[str, Any]:
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    main.__builtins__ = builtins  # type: ignore[attr-defined]
    # Without the site module these two are missing; policies write them by habit.
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    sys.path.insert(0, "")
    return vars(main)


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _private_environment(directory: str) -> None:
    os.environ["HOME"] = os.environ["TMPDIR"] = directory
    os.environ.pop("LD_LIBRARY_PATH", None)
    tempfile.tempdir = None


def _private_files(lifeline_fd: int) -> None:
    """Leave open: nothing to read, one file for all output, the lifeline. The server's files are closed."""
    output_fd = _unnamed_file()
    # Appending: after the file is emptied, the next write starts at its beginning.
    fcntl.fcntl(output_fd, fcntl.F_SETFL, fcntl.fcntl(output_fd, fcntl.F_GETFL) | os.O_APPEND)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (lifeline_fd, output_fd)]
    os.dup2(high[0], _CHANNEL, inheritable=False)
    os.dup2(high[1], _OUTPUT, inheritable=False)
    os.dup2(high[1], 1)
    os.dup2(high[1], 2)
    processes.close_files_from(_OUTPUT + 1)


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("output")
    descriptor, path = tempfile.mkstemp(dir=".")
    os.unlink(path)
    return descriptor


def _same_random_numbers_in_every_session() -> None:
    # A branch replays the calls of its prefix and must come to the same values.
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def _allow_cpu(seconds: int) -> None:
    # Where policy code lowered its own limit, that stays.
    with contextlib.suppress(OSError, ValueError):
        limits_module.allow_cpu(seconds)
