"""The paper's tag format: finding tool calls in sampled text, and putting results back without letting them speak.

``<think> … </think> <search> query </search> <result> … </result> <python> code </python> … <answer> … </answer>``
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL_TAGS = ("think", "search", "python", "result", "answer")
RESULT_OPEN, RESULT_CLOSE = "<result>", "</result>"


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A tool call that ends a turn."""

    name: str
    argument: str | None  # None: the closing tag has no opening tag in this turn


def stop_strings(tool_names: Iterable[str]) -> tuple[str, ...]:
    """The closing tags that end a turn."""
    return tuple(f"</{name}>" for name in tool_names)


def parse_call(turn: str, tool_names: Sequence[str]) -> ParsedCall | None:
    """The tool call that ends a turn, if one does.

    Args:
        turn: text sampled since the last tool result. Generation stops at a closing tag, so a call is at the very
            end; a token that completes the tag may carry white space after it.
        tool_names: the tools at hand.
    """
    text = turn.rstrip()
    for name in tool_names:
        if text.endswith(f"</{name}>"):
            _, opening, argument = text[: -len(f"</{name}>")].rpartition(f"<{name}>")
            return ParsedCall(name, argument.strip() if opening else None)
    return None


def render_result(text: str) -> str:
    """A tool result as the policy sees it."""
    return f"{RESULT_OPEN}{text}{RESULT_CLOSE}"


class ResultEncoder:
    """Encodes tool results so that nothing inside them acts as a control tag or a special token.

    Args:
        tokenizer: the policy's tokenizer.
        tool_names: their tags are control tags too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tool_names: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        tags = dict.fromkeys([*CONTROL_TAGS, *tool_names])
        marks = {mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")}
        added = tokenizer.get_added_vocab()
        self._control_ids = frozenset(added.values()) | frozenset(tokenizer.all_special_ids)
        texts = marks | set(added) | set(tokenizer.all_special_tokens)
        self._control_text = re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))
        self._open = tokenizer.encode(RESULT_OPEN, add_special_tokens=False)
        self._close = tokenizer.encode(RESULT_CLOSE, add_special_tokens=False)

    def defuse(self, text: str) -> str:
        """The text with a space inside everything that looks like a control tag or special token."""
        while self._control_text.search(text):
            text = self._control_text.sub(lambda match: _broken(match.group()), text)
        return text

    def encode(self, text: str, max_tokens: int) -> tuple[list[int], str]:
        """Token ids of the result between its tags, and the text shown.

        Args:
            text: what the tool answered.
            max_tokens: longest result without the tags; longer ones are cut.
        """
        shown = self.defuse(text)
        body = self._encode_body(shown)
        if len(body) > max_tokens:
            shown = str(self._tokenizer.decode(body[:max_tokens]))
            # A cut inside a character or a pre-token may decode to something else: encode what is shown.
            body = self._encode_body(self.defuse(shown))[:max_tokens]
        return [*self._open, *body, *self._close], shown

    def _encode_body(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        # A tokenizer that normalises text may still fold something into a control token.
        return [token for token in ids if token not in self._control_ids]


def _broken(mark: str) -> str:
    return f"{mark[0]} {mark[1:]}" if len(mark) > 1 else " "
