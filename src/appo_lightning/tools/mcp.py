"""Tools of any MCP server, over standard input and output or streamable HTTP."""

from __future__ import annotations

import json
import threading
import warnings
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from appo_lightning.errors import ConfigurationError, ToolBroken, ToolFailure
from appo_lightning.tools._mcp import Connection, MCPServer
from appo_lightning.tools.base import Tool, ToolSession, check_tool_name

if TYPE_CHECKING:
    from appo_lightning.types import Task

_MAX_FAILED_STARTS = 3  # in a row; then the run stops


class MCPTool(Tool):
    """A tool of an MCP server: ``<name>{"city": "Lund", "days": 3}</name>``.

    The call is one JSON object, checked against the schema that the server gives; where that has a single ``string``,
    the text between the tags is the argument itself. Without ``tool`` the call says which:
    ``<name>{"tool": "navigate", "arguments": {"url": "..."}}</name>``.

    Tools with equal ``server`` share one connection per process. A server that ends fails the calls under way and is
    started again for the next one; when that fails three times in a row, the run stops.

    Args:
        server: how to reach the server.
        tool: its name on the server; null: all tools of the server under one tag.
        name: the tag; null takes the tool's name. Needed without ``tool``.
        timeout_s: wall-clock limit of one call, seconds.
        stateful: the server remembers earlier calls. Each trajectory then gets a connection of its own, and with a
            ``command`` a process of its own; a branch repeats the calls of its prefix. Tools that share such state
            must be one tool here (``tool: null``).

    Raises:
        ConfigurationError: options contradict each other; at a session's start also: the server has no such tool, an
            environment variable is missing, or the client library.
        ToolBroken: the server does not start.
    """

    _link: _Link | None
    _own_links: set[_Link]

    def __init__(
        self,
        server: MCPServer,
        tool: str | None = None,
        *,
        name: str | None = None,
        timeout_s: float = 30.0,
        stateful: bool = False,
    ) -> None:
        if tool is None and name is None:
            raise ConfigurationError("MCPTool needs a name where it stands for all tools of a server: set name or tool")
        if not timeout_s > 0:
            raise ConfigurationError(f"timeout_s must be a positive number of seconds, got {timeout_s}")
        self.server, self.tool = server, tool
        self.name = check_tool_name(name or tool or "")
        self.timeout_s, self.stateful = timeout_s, stateful
        self._start_empty()

    def prepare(self) -> None:
        if not self.stateful:
            self._learn(self._shared_link())
            return
        link = _Link(self.server)
        try:
            self._learn(link)
        finally:
            link.close()

    def open(self, task: Task) -> ToolSession:
        if self.stateful:
            link = _Link(self.server)
            with self._lock:
                self._own_links.add(link)
        else:
            link = self._shared_link()
        try:
            self._learn(link)
        except BaseException:
            if self.stateful:
                self._forget(link)
            raise
        return MCPSession(self, link)

    def close(self) -> None:
        with self._lock:
            shared, self._link = self._link, None
            own, self._own_links = self._own_links, set()
        if shared is not None:
            _release(shared)
        for link in own:
            link.close(wait=False)
        for link in own:
            link.close()

    def _shared_link(self) -> _Link:
        with self._lock:
            if self._link is None:
                self._link = _acquire(self.server)
            return self._link

    def _learn(self, link: _Link) -> None:
        """Take description and schema from the server, once; a tool that it does not have stops the run."""
        offered = link.tools()
        if self.tool is None:
            self.description = "; ".join(f"{name}: {_first_line(tool)}" for name, tool in sorted(offered.items()))
            self.parameters = {
                "type": "object",
                "properties": {"tool": {"enum": sorted(offered)}, "arguments": {"type": "object"}},
                "required": ["tool"],
                "additionalProperties": False,
            }
            return
        if self.tool not in offered:
            raise ConfigurationError(
                f"{self.server}: expected a tool {self.tool!r}, found {', '.join(sorted(offered)) or 'none'}; set tool"
            )
        schema = offered[self.tool].input_schema
        self.description = _first_line(offered[self.tool])
        text = _single_text(schema)
        self.parameters = None if text else schema
        self.text_argument = text or Tool.text_argument

    def _forget(self, link: _Link) -> None:
        with self._lock:
            self._own_links.discard(link)
        link.close(wait=False)

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self._link = None
        self._own_links = set()

    def __getstate__(self) -> dict[str, Any]:
        # Copies and worker processes have connections of their own.
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_empty()


class MCPSession(ToolSession):
    """The calls of one trajectory."""

    def __init__(self, tool: MCPTool, link: _Link) -> None:
        self._tool, self._link = tool, link
        self._lock = threading.Lock()
        self._running: Future[Any] | None = None

    def call(self, argument: str) -> str:
        name, arguments = self._parsed(argument)
        try:
            connection = self._link.connection()
            future = connection.call(name, arguments, self._tool.timeout_s)
            with self._lock:
                self._running = future
            return _text_of(connection.wait(future, self._tool.timeout_s))
        except ConnectionError as ended:
            lost = " Its state is lost." if self._tool.stateful else ""
            raise ToolFailure(f"{ended}. It is started again for the next call.{lost}") from None
        finally:
            with self._lock:
                self._running = None

    def interrupt(self) -> None:
        with self._lock:
            if self._running is not None:
                self._running.cancel()

    def close(self) -> None:
        if self._tool.stateful:
            self._tool._forget(self._link)

    def _parsed(self, argument: str) -> tuple[str, dict[str, Any]]:
        """The tool's name on the server, and its checked arguments."""
        offered = self._link.tools()
        if self._tool.tool is not None:
            schema = offered[self._tool.tool].input_schema
            text = _single_text(schema)
            return self._tool.tool, {text: argument} if text else _checked(_json_object(argument), schema)
        assert self._tool.parameters is not None
        call = _checked(_json_object(argument), self._tool.parameters)
        return call["tool"], _checked(call.get("arguments", {}), offered[call["tool"]].input_schema)


class _Link:
    """A connection that is renewed when it has ended."""

    def __init__(self, server: MCPServer) -> None:
        self.server = server
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._tools: dict[str, Any] | None = None
        self._failed_starts = 0
        self.users = 0

    def connection(self) -> Connection:
        """One that is up, as far as is known.

        Raises:
            ConnectionError: the server does not start; or ``ToolBroken``, the first time or too often.
        """
        with self._lock:
            if self._connection is None or not self._connection.alive:
                try:
                    self._connection = Connection(self.server)
                except ToolBroken as broken:
                    self._failed_starts += 1
                    if self._tools is None or self._failed_starts >= _MAX_FAILED_STARTS:
                        raise
                    warnings.warn(str(broken), stacklevel=2)
                    raise ConnectionError("the server has ended and did not start") from None
                self._failed_starts = 0
            return self._connection

    def tools(self) -> dict[str, Any]:
        """What the server offered when it was first asked."""
        if self._tools is None:
            try:
                self._tools = self.connection().tools()
            except (ConnectionError, ToolFailure) as error:
                raise ToolBroken(f"{self.server}: expected its list of tools, found: {error}") from None
        return self._tools

    def close(self, *, wait: bool = True) -> None:
        """End the connection."""
        with self._lock:
            if self._connection is not None:
                self._connection.close(wait=wait)


_links: dict[MCPServer, _Link] = {}
_links_lock = threading.Lock()


def _acquire(server: MCPServer) -> _Link:
    """The connection that every tool of a server shares in this process."""
    with _links_lock:
        link = _links.setdefault(server, _Link(server))
        link.users += 1
        return link


def _release(link: _Link) -> None:
    with _links_lock:
        link.users -= 1
        if link.users:
            return
        del _links[link.server]
    link.close()


def _json_object(argument: str) -> dict[str, Any]:
    try:
        value = json.loads(argument or "{}")
    except ValueError as error:
        raise ToolFailure(f"expected a JSON object, found text that is not JSON ({error})", "malformed") from None
    if not isinstance(value, dict):
        raise ToolFailure(f"expected a JSON object, found {value!r:.80}", "malformed")
    return value


def _checked(arguments: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    from jsonschema import Draft202012Validator

    mistakes = sorted(Draft202012Validator(schema).iter_errors(arguments), key=lambda mistake: list(mistake.path))
    if mistakes:
        told = "; ".join(f"{mistake.json_path.removeprefix('$.')}: {mistake.message}" for mistake in mistakes[:3])
        expected = ", ".join(
            f"{name} ({entry.get('type', 'any')}{'' if name in schema.get('required', ()) else ', optional'})"
            for name, entry in schema.get("properties", {}).items()
        )
        raise ToolFailure(f"{told.replace('$: ', '')}; expected a JSON object: {expected}", "malformed")
    return arguments


def _single_text(schema: dict[str, Any]) -> str | None:
    """The name of the only parameter, if it is a text."""
    properties = schema.get("properties", {})
    name = next(iter(properties), None)
    return name if len(properties) == 1 and properties[name].get("type") == "string" else None


def _first_line(tool: Any) -> str:
    return (tool.description or "").strip().partition("\n")[0]


def _text_of(result: Any) -> str:
    """What the policy reads of a result."""
    texts = [block.text if block.type == "text" else f"[{block.type}]" for block in result.content]
    if not texts and result.structured_content is not None:
        texts = [json.dumps(result.structured_content, ensure_ascii=False)]
    text = "\n".join(texts)
    if result.is_error:
        raise ToolFailure(text or "the server gave no reason")
    return text
