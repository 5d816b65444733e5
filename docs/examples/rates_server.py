"""An MCP server with two tools, and how an agent calls them."""

import sys
from typing import Literal

from mcp.server.mcpserver import MCPServer

RATES = {"EUR": 1.0, "SEK": 11.0, "USD": 1.1}
server = MCPServer("rates")


@server.tool()
def convert(amount: float, source: Literal["EUR", "SEK", "USD"], target: Literal["EUR", "SEK", "USD"]) -> float:
    """Converts an amount of money."""
    return round(amount / RATES[source] * RATES[target], 2)


@server.tool()
def currencies(letter: str) -> str:
    """Lists the currencies that begin with a letter."""
    return ", ".join(code for code in RATES if code.startswith(letter))


def call_both() -> None:
    """What the tool loop does with ``<convert>…</convert>`` and ``<currencies>…</currencies>``."""
    from appo_lightning.errors import ToolFailure
    from appo_lightning.tools.mcp import MCPServer as Server
    from appo_lightning.tools.mcp import MCPTool
    from appo_lightning.types import Task

    question = Task(id="trial", prompt_ids=[], references=())
    rates = Server(command=(sys.executable, __file__, "serve"))
    for name, argument in (
        ("convert", '{"amount": 10, "source": "USD", "target": "SEK"}'),
        ("convert", '{"amount": 10, "source": "GBP"}'),
        ("currencies", "S"),
    ):
        tool = MCPTool(rates, name)
        try:
            print(f"{tool.name}: {tool.open(question).call(argument)}")
        except ToolFailure as failure:
            print(f"{tool.name}: {failure}")
        tool.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        server.run()
    else:
        call_both()
