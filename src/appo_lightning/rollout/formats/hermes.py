"""JSON function calls in the form of Hermes and Qwen, through the model's own chat template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.function_calls import CALL_CLOSE, CALL_OPEN, FunctionCall, read_calls
from appo_lightning.rollout.formats.base import (
    UNKNOWN_TOOL,
    CallFormat,
    CallSyntax,
    EncodedResult,
    ParsedCall,
    Turn,
)
from appo_lightning.rollout.formats.plain_text import PlainText, valid_text
from appo_lightning.rollout.formats.template import ResultFrame, check_history_is_kept, find_result_frame
from appo_lightning.tokens import Decoder, encode_pieces, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from appo_lightning.tools.base import Tool

CONTROL_TAGS = ("think", "answer", "tool_call", "tool_response")


class HermesFormat(CallFormat):
    """JSON function calls: ``<tool_call>{"name": "search", "arguments": {"query": "..."}}</tool_call>``.

    The chat template writes the tools into the prompt. A turn ends with EOS, the first token that does, and may hold
    several calls: they run one after the other, in their order, and are answered together, as the template answers
    them. A turn without a call ends the rollout. What the policy wrote is never rendered again: between its turns stand
    the tokens that the template puts there.

    Args:
        allow_rewritten_history: accept a chat template that drops earlier thoughts or writes earlier calls anew.
            Training is exact all the same; but wherever the model is used with that template it reads another history
            than the one it was trained on.
    """

    name = "hermes"
    control_tags = CONTROL_TAGS

    def __init__(self, allow_rewritten_history: bool = False) -> None:
        self.allow_rewritten_history = allow_rewritten_history

    def bind(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool]) -> CallSyntax:
        if not tools:
            raise ConfigurationError(
                "data.call_format: HermesFormat shows the tools of data.tools to the model, found none; name them, or "
                "leave the format out"
            )
        frame = find_result_frame(tokenizer)
        if not self.allow_rewritten_history:
            check_history_is_kept(tokenizer)
        return HermesSyntax(tokenizer, tools, frame)


class HermesSyntax(CallSyntax):
    """Function calls for a tokenizer and some tools.

    Args:
        tokenizer: the policy's.
        tools: that may be called.
        frame: what the chat template writes around results.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool], frame: ResultFrame) -> None:
        self._tokenizer, self._frame = tokenizer, frame
        self._decode = Decoder(tokenizer)
        self._tools = {tool.name: tool for tool in tools}
        self._end_of_turn = tokenizer.eos_token_id
        self._plain = PlainText(tokenizer, CONTROL_TAGS)
        self._frame_ids = [encode_text(tokenizer, text) for text in (frame.opening, frame.between, frame.closing)]

    @property
    def prompt_tools(self) -> list[dict[str, Any]]:
        return [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": tool.schema},
            }
            for tool in self._tools.values()
        ]

    def read_turn(self, ids: Sequence[int], finish: str | None) -> Turn:
        # Not by ``finish`` alone: a checkpoint may have other EOS tokens, after which no turn follows in the template.
        if not ids or ids[-1] != self._end_of_turn:
            return Turn(over=finish == "eos")
        calls = tuple(self._parsed(call) for call in read_calls(self._decode(ids[:-1])))
        return Turn(calls=calls, over=not calls)

    def encode_results(self, texts: Sequence[str], *, max_result_tokens: int, room: int) -> list[EncodedResult]:
        opening, between, closing = self._frame_ids
        left = room - len(opening) - (len(texts) - 1) * len(between) - len(closing)
        bodies: list[list[int]] = []
        shown: list[str] = []
        for text in texts:
            ids, seen = self._plain.encode_plain(text, min(max_result_tokens, max(0, left)))
            left -= len(ids)
            bodies.append(ids)
            shown.append(seen)
        pieces = self._as_template(shown) or self._piecewise(bodies)
        starts = accumulate((len(piece) for piece in pieces), initial=0)
        cut = [piece[: max(0, room - start)] for piece, start in zip(pieces, starts, strict=False)]
        return [EncodedResult(ids, seen) for ids, seen in zip(cut, shown, strict=True)]

    def prepare(self, text: str, *, max_result_tokens: int) -> None:
        self._plain.prepare(text, max_result_tokens)

    @property
    def end_of_calls(self) -> tuple[int, ...]:
        return (self._end_of_turn,)

    def write_call(self, name: str, argument: Sequence[str], *, after: str) -> list[str]:
        tool = self._tools.get(name)
        if tool is None:
            raise DataError(f"expected calls of the tools of data.tools ({', '.join(self._tools)}), found {name!r}")
        opening = f'{CALL_OPEN}\n{{"name": {json.dumps(name)}, "arguments": '
        closing = f"}}\n{CALL_CLOSE}"
        if after and not after.endswith("\n"):  # as the templates of this family write it
            opening = "\n" + opening
        pieces = list(argument)
        if tool.parameters is None:
            pieces[:1] = [piece.lstrip() for piece in pieces[:1]]
            pieces[-1:] = [piece.rstrip() for piece in pieces[-1:]]
            pieces = [json.dumps(piece, ensure_ascii=False)[1:-1] for piece in pieces]
            opening, closing = f'{opening}{{{json.dumps(tool.text_argument)}: "', f'"}}{closing}'
        written = [opening, *pieces, closing]
        calls = [self._parsed(call) for call in read_calls(after + "".join(written))]
        if len(calls) != 1 or calls[0].argument is None:
            found = calls[-1].problem if calls else "none"
            raise DataError(f"expected a call of {name!r} that can be read, found {found}")
        return written

    def _as_template(self, shown: Sequence[str]) -> list[list[int]] | None:
        """Tokens of the results and what stands around them, as the template's whole text would be tokenised.

        None: a result met its surroundings in a control token, which only a very strange vocabulary allows.
        """
        frame, last = self._frame, len(shown) - 1
        texts = [
            (frame.between if n else frame.opening) + text + (frame.closing if n == last else "")
            for n, text in enumerate(shown)
        ]
        pieces = encode_pieces(self._tokenizer, texts)
        opening, between, closing = self._frame_ids
        found = self._controls([token for piece in pieces for token in piece])
        return pieces if found == self._controls([*opening, *between * last, *closing]) else None

    def _piecewise(self, bodies: Sequence[list[int]]) -> list[list[int]]:
        opening, between, closing = self._frame_ids
        pieces = [[*(between if n else opening), *body] for n, body in enumerate(bodies)]
        pieces[-1] += closing
        return pieces

    def _controls(self, ids: Sequence[int]) -> Counter[int]:
        return Counter(token for token in ids if token in self._plain.control_ids)

    def _parsed(self, call: FunctionCall) -> ParsedCall:
        tool = self._tools.get(call.name)
        if call.arguments is None:
            return ParsedCall(UNKNOWN_TOOL if tool is None else tool.name, None, call.problem)
        if tool is None:
            problem = f"unknown tool {_short(call.name)}; there are: {', '.join(self._tools)}"
            return ParsedCall(UNKNOWN_TOOL, None, problem)
        if tool.parameters is not None:
            return ParsedCall(tool.name, valid_text(json.dumps(call.arguments, ensure_ascii=False)))
        text = call.arguments.get(tool.text_argument)
        if not isinstance(text, str) or len(call.arguments) > 1:
            problem = f'expected arguments {{"{tool.text_argument}": "..."}}, got {_short(call.arguments)}'
            return ParsedCall(tool.name, None, problem)
        return ParsedCall(tool.name, valid_text(text))


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + "…"
