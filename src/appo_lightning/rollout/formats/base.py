"""The contract of a call format: tokens of a turn in, calls out; results in, tokens out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from appo_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from appo_lightning.tools.base import Tool

UNKNOWN_TOOL = "unknown"  # the name of a call that names no tool: the policy must not make names up for our metrics


@dataclass(slots=True)
class ParsedCall:
    """A tool call that a turn holds."""

    name: str
    argument: str | None  # None: malformed
    problem: str = ""  # what is wrong with a malformed one, for the policy to read


@dataclass(slots=True)
class Turn:
    """What a turn means for the rollout; neither calls nor ``over``: the policy goes on writing."""

    calls: tuple[ParsedCall, ...] = ()  # to be answered before the policy goes on
    over: bool = False  # the rollout ends here
    stop: tuple[str, ...] = ()  # strings that end the turn, should it go on


@dataclass(slots=True)
class EncodedResult:
    """A tool result as it enters the trajectory."""

    ids: list[int]
    shown: str  # what of it the policy reads


class CallSyntax(ABC):
    """A call format for one tokenizer and some tools. It keeps no state between calls."""

    @property
    def prompt_tools(self) -> list[dict[str, Any]] | None:
        """Tool schemas for the chat template; None: prompts say themselves which tools there are."""
        return None

    @abstractmethod
    def read_turn(self, ids: Sequence[int], finish: str | None) -> Turn:
        """Read what the policy has written since the last result.

        Args:
            ids: its tokens; a branch may begin in their midst.
            finish: ``Completion.finish`` of the last request; None: none was made in this turn yet.
        """

    @abstractmethod
    def encode_results(self, texts: Sequence[str], *, max_result_tokens: int, room: int) -> list[EncodedResult]:
        """The tokens that answer the calls of a turn and let the policy go on.

        Nothing inside a result may act as a control tag or a special token.

        Args:
            texts: one for each call.
            max_result_tokens: longest result, without what stands around it.
            room: tokens that all of them may take together; the rest is cut off.
        """

    def prepare(self, text: str, *, max_result_tokens: int) -> None:
        """Begin the work of ``encode_results`` for one of its texts, which changes nothing but its time.

        Runs in the thread of the tool that answered, beside generation.
        """

    # --- only for demonstrations ---

    @property
    def end_of_calls(self) -> tuple[int, ...]:
        """Tokens with which a policy ends a turn that holds a call, behind the text of the call."""
        return ()

    def write_call(self, name: str, argument: Sequence[str], *, after: str) -> list[str]:
        """The text of a call that ends a turn: what stands before the argument, its pieces, what stands behind them.

        Args:
            name: of the tool.
            argument: in pieces, which may be written otherwise but not joined or cut.
            after: what the turn has said before.

        Raises:
            DataError: such a call would not be read as it is meant.
        """
        raise ConfigurationError(f"{type(self).__name__} cannot write demonstrations; give it write_call")


class CallFormat(ABC):
    """How calls are written: an option, which knows neither tokenizer nor tools yet.

    Attributes:
        name: a reward that reads calls says for which of these it is made.
        control_tags: tags that no tool result may show, besides those of the tools.
    """

    name: str
    control_tags: tuple[str, ...] = ()

    @abstractmethod
    def bind(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool]) -> CallSyntax:
        """The format for a tokenizer and some tools.

        Raises:
            ConfigurationError: the tokenizer or its chat template cannot carry the format.
        """
