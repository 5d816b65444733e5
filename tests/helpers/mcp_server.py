"""An MCP server for the tests: over standard input and output, or HTTP on the port that it is given."""

import os
import sys
import threading
import time

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("test")
notes: list[str] = []


@server.tool()
def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    And says no more.
    """
    return a + b


@server.tool()
def echo(text: str) -> str:
    """Says it again."""
    return text


@server.tool()
def note(text: str) -> str:
    """Keeps notes for as long as the server lives."""
    notes.append(text)
    return ",".join(notes)


@server.tool()
def forget() -> str:
    """Forgets the last note."""
    notes.pop()
    return ",".join(notes)


@server.tool()
def nap(seconds: float) -> str:
    """Sleeps."""
    time.sleep(seconds)
    return "awake"


@server.tool()
def fail(reason: str) -> str:
    """Fails."""
    raise ToolError(reason)


@server.tool()
def environment(name: str) -> str:
    """Reads an environment variable."""
    return os.environ.get(name, "not set")


@server.tool()
def header(name: str, context: Context) -> str:
    """Reads a header of the request."""
    return context.request_context.request.headers.get(name, "not set")


@server.tool()
def process() -> int:
    """Tells the number of the process."""
    return os.getpid()


@server.tool()
def die(after: float) -> str:
    """Ends the server, with some last words that hold a secret."""
    print("my key was", os.environ.get("TEST_MCP_KEY", ""), file=sys.stderr, flush=True)
    threading.Timer(after, os._exit, (3,)).start()
    time.sleep(after + 5)
    return "still here"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
