"""The paper's tag format: finding tool calls in sampled text, and putting results back without letting them speak.

``<think> … </think> <search> query </search> <result> … </result> <python> code </python> … <answer> … </answer>``
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appo_lightning.tokens import decode_tokens, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL_TAGS = ("think", "search", "python", "result", "answer")
RESULT_OPEN, RESULT_CLOSE = "<result>", "</result>"
_MAX_CHARS_PER_TOKEN = 64  # text beyond it is not even tokenised: a tool may answer with megabytes


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A tool call that ends a turn."""

    name: str
    argument: str | None  # None: the closing tag has no opening tag in this turn


def stop_strings(tool_names: Iterable[str], turn: str = "") -> tuple[str, ...]:
    """What ends a turn: the closing tags.

    Args:
        tool_names: the tools at hand.
        turn: text of the turn so far. A tag that it has begun (a branch may start inside one) is completed by the
            rest of the tag, which samplers look for in new tokens only. The rest may also occur elsewhere; the turn
            then goes on, because it holds no call.
    """
    tags = [f"</{name}>" for name in tool_names]
    rests = [tag[length:] for tag in tags for length in range(1, len(tag)) if turn.endswith(tag[:length])]
    return tuple(dict.fromkeys([*tags, *rests]))


def parse_call(turn: str, tool_names: Iterable[str]) -> ParsedCall | None:
    """The tool call that ends a turn, if one does.

    Args:
        turn: text sampled since the last tool result. Generation stops at a closing tag, so there is at most one; the
            token that completes it may carry more text behind it (a line break, ``</``), which is no part of the call.
        tool_names: the tools at hand.
    """
    stop, name = max(((turn.rfind(f"</{name}>"), name) for name in tool_names), default=(-1, ""))
    if stop < 0:
        return None
    _, opening, argument = turn[:stop].rpartition(f"<{name}>")
    return ParsedCall(name, argument.strip() if opening else None)


class ResultEncoder:
    """Encodes tool results so that nothing inside them acts as a control tag or a special token.

    Args:
        tokenizer: the policy's tokenizer.
        tool_names: their tags are control tags too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tool_names: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        tags = dict.fromkeys([*CONTROL_TAGS, *tool_names])
        # Some vocabularies add runs of spaces as tokens: they control nothing.
        added = {text: token for text, token in tokenizer.get_added_vocab().items() if text.strip()}
        self._control_ids = frozenset(added.values()) | frozenset(tokenizer.all_special_ids)
        texts = {mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")} | set(added)
        self._control_text = re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))
        self._open = encode_text(tokenizer, RESULT_OPEN)
        self._close = encode_text(tokenizer, RESULT_CLOSE)
        self.num_tag_tokens = len(self._open) + len(self._close)

    def defuse(self, text: str) -> str:
        """The text with a space inside everything that looks like a control tag or special token."""
        for _ in range(8):  # breaking one mark can only form another from what the vocabulary makes of spaces
            if not self._control_text.search(text):
                break
            text = self._control_text.sub(lambda match: _broken(match.group()), text)
        return text

    def encode(self, text: str, max_tokens: int) -> tuple[list[int], str]:
        """Token ids of the result between its tags, and the text shown.

        Args:
            text: what the tool answered.
            max_tokens: longest result without the tags; longer ones are cut.
        """
        body, shown = self._encode_body(text[: _MAX_CHARS_PER_TOKEN * max_tokens])
        if len(body) > max_tokens:
            body = self._cut(body, max_tokens)
            shown = decode_tokens(self._tokenizer, body)
        return [*self._open, *body, *self._close], shown

    def _encode_body(self, text: str) -> tuple[list[int], str]:
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be tokenised
        # A tokenizer that normalises text may still fold something into a control token, or its neighbours into a tag.
        for _ in range(8):
            ids = encode_text(self._tokenizer, self.defuse(text))
            ids = [token for token in ids if token not in self._control_ids]
            text = decode_tokens(self._tokenizer, ids)
            if not self._control_text.search(text):
                return ids, text
        return [], ""

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """The first tokens, without the beginning of a character (at most three bytes) that the cut left behind."""
        for stop in range(length, max(length - 4, 0), -1):
            if not decode_tokens(self._tokenizer, ids[:stop]).endswith("\ufffd"):
                return ids[:stop]
        return ids[:length]


def _broken(mark: str) -> str:
    return f"{mark[0]} {mark[1:]}" if len(mark) > 1 else " "
