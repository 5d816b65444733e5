"""The contract of a tool: one session per trajectory, text in, text out."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from appo_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from appo_lightning.types import Task


_NAME = re.compile(r"[A-Za-z][\w-]*")
_RESERVED_NAMES = ("think", "result", "answer")


def check_tool_name(name: str) -> str:
    """The name, if it can be a tag.

    Raises:
        ConfigurationError: it cannot.
    """
    if not _NAME.fullmatch(name) or name in _RESERVED_NAMES:
        raise ConfigurationError(
            f"a tool's name is its tag: expected letters, digits, _ and -, and none of {', '.join(_RESERVED_NAMES)}, "
            f"got {name!r}; set name"
        )
    return name


class ToolSession(ABC):
    """A tool as one trajectory sees it.

    Calls of one session never overlap, nor does ``close`` overlap a call; sessions run in parallel threads. A session
    whose call outlived its time is closed and never used again.

    Attributes:
        state_digest: after a call, a short text that differs where the session remembers something else, for a tool
            with ``stateful``; "" says nothing.
    """

    state_digest: str = ""

    @abstractmethod
    def call(self, argument: str) -> str:
        """Answer one call.

        Raises:
            ToolFailure: the call could not be answered; the message is shown to the policy.
            AppoError: the tool cannot work at all; stops the run.
        """

    def interrupt(self) -> None:
        """Make a running ``call`` return soon; called from another thread when its time is up."""

    def close(self) -> None:
        """Release what the session holds. Safe to call twice."""


class Tool(ABC):
    """Something the policy may call, by writing ``<name>argument</name>`` or a JSON function call.

    Attributes:
        name: the tag.
        description: one sentence for the model where the chat template shows tools, for whoever writes the prompt
            where it does not.
        timeout_s: wall-clock limit of one call, seconds.
        stateful: sessions remember earlier calls; a branch then replays the calls of its prefix.
        parameters: JSON schema of the arguments where a call carries several, as one JSON object between the tags;
            None where the text between the tags is the one argument.
        text_argument: what that one argument is called in a JSON function call.
        incidental: options that change no answer, besides ``timeout_s``: a recording holds whatever they are.
    """

    name: str
    description: str = ""
    timeout_s: float = 10.0
    stateful: bool = False
    parameters: dict[str, Any] | None = None
    text_argument: str = "input"
    incidental: ClassVar[tuple[str, ...]] = ()

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the arguments of a function call."""
        if self.parameters is not None:
            return self.parameters
        name = self.text_argument
        return {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}

    def prepare(self) -> None:
        """Learn ``description`` and ``parameters`` where another process knows them: before a prompt shows them.

        Raises:
            AppoError: the tool cannot work at all; stops the run.
        """

    @abstractmethod
    def open(self, task: Task) -> ToolSession:
        """Start a session for one trajectory of ``task``.

        Must be cheap: it is called for every trajectory that uses the tool, and once more at the start of a run, so
        that a server behind it starts outside the time of a call.
        """

    def take_counts(self) -> dict[str, int]:
        """What happened since the last time, for metrics: ``lookups`` and ``hits`` of a cache, ``retries``."""
        return {}

    def close(self) -> None:
        """Release shared resources at the end of the run. Safe to call twice."""


class StatelessTool(Tool):
    """A tool whose answer depends on the argument and the task only: implement ``run``."""

    @abstractmethod
    def run(self, argument: str, task: Task) -> str:
        """Answer one call.

        Raises:
            ToolFailure: the call could not be answered; the message is shown to the policy.
        """

    def open(self, task: Task) -> ToolSession:
        return _StatelessSession(self, task)


class _StatelessSession(ToolSession):
    def __init__(self, tool: StatelessTool, task: Task) -> None:
        self._tool, self._task = tool, task

    def call(self, argument: str) -> str:
        return self._tool.run(argument, self._task)
