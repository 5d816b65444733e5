"""One connection to an MCP server: the official client in a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import warnings
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError, Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from appo_lightning.errors import ConfigurationError, ToolBroken, ToolFailure
from appo_lightning.tools._http import keep_keys_out_of_logs
from appo_lightning.tools._secrets import check_address, check_variable, shown_address

if TYPE_CHECKING:
    from mcp import Client

_CONNECTION_CLOSED, _REQUEST_TIMEOUT = -32000, -32001  # codes of the client library
_GRACE_S = 0.5  # the client's own time limit comes first: it tells the server to stop
_CLOSE_S = 10.0  # a server that ignores everything is killed by the client library after about half of it
_LAST_WORDS = 400  # characters


@dataclass(frozen=True)
class MCPServer:
    """How to reach an MCP server: a command to start, or an address.

    Args:
        command: program and arguments of a server that talks over its standard input and output. It is started in
            ``cwd`` with HOME, LOGNAME, PATH, SHELL, TERM and USER of the environment, and what ``environment`` names.
        url: address of a server that is running, for example ``http://127.0.0.1:8000/mcp`` (streamable HTTP).
        environment: names of further environment variables that the command gets.
        headers: HTTP header by name to the environment variable that holds its value, for example
            ``{Authorization: MY_SERVER_AUTHORIZATION}``; only with ``url``. So no key stands in a config.
        cwd: directory of the command; null is the current one.
        start_timeout_s: limit for starting and the first exchange, seconds.
    """

    command: tuple[str, ...] = ()
    url: str | None = None
    environment: tuple[str, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    start_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.url is not None:
            check_address(self.url, "server.url", "name its environment variable in server.headers")
        for name, variable in self.headers.items():
            check_variable(variable, f"server.headers.{name}")
        if any("=" in name for name in self.environment):
            # What stands behind may be a key: not shown.
            raise ConfigurationError(
                "server.environment must hold NAMES of variables, got NAME=value; export it instead"
            )
        if bool(self.command) == bool(self.url):
            raise ConfigurationError(
                f"server must have a command or a url, and not both, got command={list(self.command)}, "
                f"url={self.url and shown_address(self.url)!r}"
            )
        if self.url is not None and (self.environment or self.cwd):
            raise ConfigurationError("server.environment and cwd are for a command, they have no effect with a url")
        if self.command and self.headers:
            raise ConfigurationError("server.headers are for a url, they have no effect with a command")
        if not self.start_timeout_s > 0:
            raise ConfigurationError(f"server.start_timeout_s must be positive, got {self.start_timeout_s}")

    def __hash__(self) -> int:
        return hash((self.command, self.url, self.environment, tuple(sorted(self.headers.items())), self.cwd))

    def __str__(self) -> str:
        return f"MCP server {shown_address(self.url) if self.url else ' '.join(self.command)!r}"


class Connection:
    """A connection that is up, or gone for good: whoever needs another makes a new one.

    Args:
        server: to start or to reach.

    Raises:
        ConfigurationError: a named environment variable is not set, or the ``mcp`` library is not installed.
        ToolBroken: the server did not start.
    """

    def __init__(self, server: MCPServer) -> None:
        self.server = server
        self._secrets = _secrets_of(server)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by the thread
        self._errors_lock = threading.Lock()  # the thread may close the file while it is read
        self._said = ""
        self._gone = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready: Future[Client] = Future()
        self._thread = threading.Thread(target=self._run, daemon=True, name="appo-mcp")
        self._thread.start()
        try:
            self._client = self._ready.result(server.start_timeout_s)
        except TimeoutError:
            self.close(wait=False)
            raise ToolBroken(f"{server}: no answer within {server.start_timeout_s:g} s{self._last_words()}") from None
        except Exception as error:
            # Not from the error: what it says and holds may be a header.
            found = self._without_secrets(_innermost(error))
            raise ToolBroken(f"{server}: expected a server that starts, found {found}{self._last_words()}") from None

    @property
    def alive(self) -> bool:
        """Whether nothing is known to have ended it."""
        return self._thread.is_alive() and not self._gone

    def tools(self) -> dict[str, Any]:
        """What the server offers, by name."""

        async def every_page() -> dict[str, Any]:
            page = await self._client.list_tools()
            found = list(page.tools)
            while page.next_cursor:
                page = await self._client.list_tools(cursor=page.next_cursor)
                found += page.tools
            return {tool.name: tool for tool in found}

        return self._outcome(self._start(every_page()), self.server.start_timeout_s)

    def call(self, name: str, arguments: dict[str, Any], timeout_s: float) -> Future[Any]:
        """Start a call; ``wait`` gives its result, ``cancel`` of the future ends it."""
        return self._start(self._client.call_tool(name, arguments, read_timeout_seconds=timeout_s))

    def wait(self, future: Future[Any], timeout_s: float) -> Any:
        """The result of a call.

        Raises:
            ToolFailure: it timed out, was cancelled, or the server refused it.
            ConnectionError: the connection is gone.
        """
        return self._outcome(future, timeout_s)

    def close(self, *, wait: bool = True) -> None:
        """End the connection, and the server if it was started here. Safe to call twice.

        Args:
            wait: until its process is gone.
        """
        if self._loop is not None and self._stop is not None:
            with suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._stop.set)
        if wait:
            self._thread.join(_CLOSE_S)

    def _start(self, coroutine: Any) -> Future[Any]:
        assert self._loop is not None
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop has ended
            coroutine.close()
            raise self._ended() from None

    def _outcome(self, future: Future[Any], timeout_s: float) -> Any:
        from mcp import MCPError

        try:
            return future.result(timeout_s + _GRACE_S)
        except TimeoutError:
            future.cancel()
            raise ToolFailure(f"no answer within {timeout_s:g} seconds", "timeout") from None
        except CancelledError:
            if self.alive:
                raise ToolFailure("stopped before it finished", "timeout") from None
            raise self._ended() from None
        except MCPError as error:
            if error.code == _REQUEST_TIMEOUT:
                raise ToolFailure(f"no answer within {timeout_s:g} seconds", "timeout") from None
            if error.code == _CONNECTION_CLOSED:
                raise self._ended() from None
            raise ToolFailure(str(error)) from None

    def _ended(self) -> ConnectionError:
        """What a call says that finds the connection gone; what the server said is for the user, not for the policy."""
        if not self._gone:
            self._gone = True
            if self._stop is not None and not self._stop.is_set():
                warnings.warn(f"{self.server} has ended{self._last_words()}", stacklevel=2)
            self.close(wait=False)
        return ConnectionError("the server has ended")

    def _last_words(self) -> str:
        """The end of what the server wrote to its standard error, secrets taken out."""
        with suppress(ValueError):  # closed, and read before that
            self._said = self._read_errors()
        return f"; it said last: {self._said}" if self._said else ""

    def _read_errors(self) -> str:
        # Not seek and read: the server shares the file's position. A little more, so that no secret is cut in two.
        length = _LAST_WORDS + max(map(len, self._secrets), default=0)
        with self._errors_lock:
            number = self._errors.fileno()
            size = os.fstat(number).st_size
            said = os.pread(number, length, max(0, size - length)).decode("utf-8", "replace")
        return " ".join(self._without_secrets(said)[-_LAST_WORDS:].split())

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        if self.server.url:
            text = text.replace(self.server.url, shown_address(self.server.url))
        return text

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as error:  # told by whoever waits; after that, calls notice that the connection is gone
            if not self._ready.done():
                self._ready.set_exception(error)
        finally:
            self._said = self._read_errors()
            with self._errors_lock:
                self._errors.close()

    async def _live(self) -> None:
        from mcp import Client

        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        stopped = asyncio.create_task(self._stop.wait())
        transport = _transport(self.server, self._errors)
        async with Client(transport, read_timeout_seconds=self.server.start_timeout_s) as client:
            self._ready.set_result(client)
            await stopped


@asynccontextmanager
async def _transport(server: MCPServer, errors: Any) -> AsyncIterator[Any]:
    if server.url is None:
        from mcp.client.stdio import StdioServerParameters, stdio_client

        parameters = StdioServerParameters(
            command=server.command[0],
            args=list(server.command[1:]),
            env={name: os.environ[name] for name in server.environment},
            cwd=server.cwd,
        )
        async with stdio_client(parameters, errlog=errors) as streams:
            yield streams
    else:
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        keep_keys_out_of_logs()
        headers = {name: os.environ[variable].strip() for name, variable in server.headers.items()}
        # A long call may keep its answer open: the call's own limit ends it.
        timeout = httpx2.Timeout(server.start_timeout_s, read=None)
        async with (
            httpx2.AsyncClient(headers=headers, timeout=timeout) as http_client,
            streamable_http_client(server.url, http_client=http_client) as streams,
        ):
            yield streams


def _secrets_of(server: MCPServer) -> list[str]:
    """Values of the environment variables that a server gets."""
    try:
        import mcp  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "MCP servers need the client library: pip install 'appo-lightning[mcp]', or pip install mcp"
        ) from None
    names = [*server.environment, *server.headers.values()]
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigurationError(
            f"{server}: expected the environment variables {', '.join(missing)}, found none; set them"
        )
    for name in server.headers.values():
        if not (os.environ[name].strip().isascii() and os.environ[name].strip().isprintable()):
            raise ConfigurationError(f"{server}: the environment variable {name} holds what no header may; mend it")
    return [value for name in names if (value := os.environ[name].strip())]


def _innermost(error: BaseException) -> str:
    """What went wrong below the groups that task groups wrap around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
