"""The paper's tag format: finding tool calls in sampled text, and putting results back without letting them speak.

``<think> … </think> <search> query </search> <result> … </result> <python> code </python> … <answer> … </answer>``
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from appo_lightning.rollout.formats.base import CallFormat, CallSyntax, EncodedResult, ParsedCall, Turn
from appo_lightning.rollout.formats.plain_text import PlainText
from appo_lightning.tokens import Decoder, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from appo_lightning.tools.base import Tool

CONTROL_TAGS = ("think", "search", "python", "result", "answer")
RESULT_OPEN, RESULT_CLOSE = "<result>", "</result>"


class TagFormat(CallFormat):
    """The paper's tags: ``<search>query</search>``, answered by ``<result>…</result>``.

    A turn ends with the token that completes the closing tag of a tool, at once: samplers look at every token. The
    response ends with EOS. Nothing is written into prompts: they, or demonstrations, must teach the tags.
    """

    name = "tags"
    control_tags = CONTROL_TAGS

    def bind(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool]) -> CallSyntax:
        return TagSyntax(tokenizer, [tool.name for tool in tools])


class TagSyntax(CallSyntax):
    """Tags for a tokenizer and some tools.

    Args:
        tokenizer: the policy's.
        tool_names: the tags of calls.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tool_names: Sequence[str]) -> None:
        self._decode, self._names = Decoder(tokenizer), tuple(tool_names)
        self._encoder = ResultEncoder(tokenizer, tool_names)
        self._nothing_written = Turn(stop=stop_strings(self._names))

    def read_turn(self, ids: Sequence[int], finish: str | None) -> Turn:
        if finish == "eos":
            return Turn(over=True)
        if not ids:
            return self._nothing_written
        text = self._decode(ids)
        call = parse_call(text, self._names)
        if call is None:
            return Turn(stop=stop_strings(self._names, text))
        if call.argument is None:
            call = replace(call, problem=f"</{call.name}> without <{call.name}>")
        return Turn(calls=(call,))

    def encode_results(self, texts: Sequence[str], *, max_result_tokens: int, room: int) -> list[EncodedResult]:
        (text,) = texts  # a turn ends at its first call
        body = min(max_result_tokens, max(0, room - self._encoder.num_tag_tokens))
        ids, shown = self._encoder.encode(text, body)
        return [EncodedResult(ids[:room], shown)]

    def prepare(self, text: str, *, max_result_tokens: int) -> None:
        self._encoder.prepare(text, max_result_tokens)

    def write_call(self, name: str, argument: Sequence[str], *, after: str) -> list[str]:
        return [f"<{name}>", *argument, f"</{name}>"]


def stop_strings(tool_names: Iterable[str], turn: str = "") -> tuple[str, ...]:
    """What ends a turn: the closing tags.

    Args:
        tool_names: the tools at hand.
        turn: text of the turn so far. A tag that it has begun (a branch may start inside one) is completed by the
            rest of the tag, which samplers look for in new tokens only. The rest may also occur elsewhere; the turn
            then goes on, because it holds no call.
    """
    tags = [f"</{name}>" for name in tool_names]
    _, opened, begun = turn.rpartition("<")  # a tag has no further one
    rests = [tag.removeprefix(opened + begun) for tag in tags if opened and tag.startswith(opened + begun)]
    return tuple(dict.fromkeys([*tags, *filter(None, rests)]))


def parse_call(turn: str, tool_names: Iterable[str]) -> ParsedCall | None:
    """The tool call that ends a turn, if one does.

    Args:
        turn: text sampled since the last tool result. Generation stops at a closing tag, so there is at most one; the
            token that completes it may carry more text behind it (a line break, ``</``), which is no part of the call.
        tool_names: the tools at hand.
    """
    stop, name = -1, ""
    for tool in tool_names:
        if (found := turn.rfind(f"</{tool}>")) > stop:
            stop, name = found, tool
    if stop < 0:
        return None
    _, opening, argument = turn[:stop].rpartition(f"<{name}>")
    return ParsedCall(name, argument.strip() if opening else None)


class ResultEncoder(PlainText):
    """Encodes tool results between their tags.

    Args:
        tokenizer: the policy's tokenizer.
        tool_names: their tags are control tags too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tool_names: Iterable[str]) -> None:
        super().__init__(tokenizer, dict.fromkeys([*CONTROL_TAGS, *tool_names]))
        self._open = encode_text(tokenizer, RESULT_OPEN)
        self._close = encode_text(tokenizer, RESULT_CLOSE)
        self.num_tag_tokens = len(self._open) + len(self._close)

    def encode(self, text: str, max_tokens: int) -> tuple[list[int], str]:
        """Token ids of the result between its tags, and the text shown.

        Args:
            text: what the tool answered.
            max_tokens: longest result without the tags; longer ones are cut.
        """
        body, shown = self.encode_plain(text, max_tokens)
        return [*self._open, *body, *self._close], shown
