"""Demonstrations as tokens: those of a rollout in which the policy said the same."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.rollout.formats.base import CallSyntax
from appo_lightning.rollout.prompts import build_task
from appo_lightning.tasks.demonstrations import LABELS, Demonstration, Segment, answered_calls
from appo_lightning.types import TaskRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_TRAINED = -1
_INDEX = {label: NOT_TRAINED if label == "tool" else index for index, label in enumerate(LABELS)}
_NO_LIMIT = 1 << 30


@dataclass(slots=True)
class TokenRow:
    """One sequence."""

    token_ids: list[int]
    labels: list[int]  # per token: index into LABELS, or NOT_TRAINED
    was_cut: bool = False  # it was longer than the limit

    def add(self, token_ids: Iterable[int], label: int) -> None:
        """Tokens that share a label."""
        self.token_ids += token_ids
        self.labels += [label] * (len(self.token_ids) - len(self.labels))


def encode_demonstration(
    demonstration: Demonstration, tokenizer: PreTrainedTokenizerBase, syntax: CallSyntax, *, max_length: int
) -> TokenRow:
    """Tokenise prompt, response and the end-of-sequence token, and label each token to train on.

    What the policy writes in a turn is encoded as a whole; results enter as they do in a rollout. A token that lies
    across two pieces takes the label of the piece in which it begins.

    Args:
        demonstration: what to imitate.
        tokenizer: a fast one, with a chat template.
        syntax: how calls are written and answered.
        max_length: the rest is cut off.

    Raises:
        ConfigurationError: the tokenizer has no chat template or gives no offsets, or the format cannot be written.
        DataError: the prompt alone is longer than ``max_length``, or a call cannot be written.
    """
    if not tokenizer.is_fast:
        raise ConfigurationError(f"the tokenizer of {tokenizer.name_or_path!r} gives no offsets; use a fast one")
    row = _prompt(demonstration, tokenizer, syntax, max_length)
    try:
        _add_response(row, demonstration, tokenizer, syntax)
    except DataError as error:
        raise DataError(f"a demonstration ({_question(demonstration)}): {error}") from None
    return TokenRow(row.token_ids[:max_length], row.labels[:max_length], was_cut=len(row.token_ids) > max_length)


def _prompt(
    demonstration: Demonstration, tokenizer: PreTrainedTokenizerBase, syntax: CallSyntax, max_length: int
) -> TokenRow:
    task = TaskRow(id="demonstration", messages=demonstration.messages, references=())
    ids = build_task(task, tokenizer, max_prompt_tokens=sys.maxsize, tools=syntax.prompt_tools).prompt_ids
    if len(ids) >= max_length:
        raise DataError(
            f"a demonstration's prompt has {len(ids)} tokens, data.max_length is {max_length}: nothing is left "
            f"to train on; raise data.max_length or drop it ({_question(demonstration)})"
        )
    row = TokenRow([], [])
    row.add(ids, NOT_TRAINED)
    return row


def _add_response(
    row: TokenRow, demonstration: Demonstration, tokenizer: PreTrainedTokenizerBase, syntax: CallSyntax
) -> None:
    calls = answered_calls(demonstration.response)
    _check_answers(demonstration.response, calls, syntax)
    said_until = 0
    for call in calls:
        said = demonstration.part(said_until, call.start())
        argument = demonstration.part(*call.span("argument"))
        texts = syntax.write_call(
            call["name"], [piece.text for piece in argument], after="".join(piece.text for piece in said)
        )
        opening, *pieces, closing = texts
        written = [Segment(text, piece.label) for text, piece in zip(pieces, argument, strict=True)]
        _add_turn(row, [*said, Segment(opening, "format"), *written, Segment(closing, "format")], tokenizer)
        row.add(syntax.end_of_calls, _INDEX["format"])
        # The loop shows results so, and says it where there is none.
        shown = call["result"].strip() or "no result"
        for result in syntax.encode_results([shown], max_result_tokens=_NO_LIMIT, room=_NO_LIMIT):
            row.add(result.ids, NOT_TRAINED)
        said_until = call.end()
    _add_turn(row, demonstration.part(said_until, len(demonstration.response)), tokenizer)
    assert isinstance(tokenizer.eos_token_id, int)
    row.add([tokenizer.eos_token_id], _INDEX["format"])


def _check_answers(response: str, calls: Sequence[re.Match[str]], syntax: CallSyntax) -> None:
    """A call without a result would be trained on as text, in a notation that the policy must not learn."""
    rest = response
    for call in calls:
        rest = rest.replace(call.group(), "", 1)
    for tool in syntax.prompt_tools or ():
        name = tool["function"]["name"]
        if f"</{name}>" in rest:
            raise DataError(f"expected <result>...</result> behind each </{name}>, found one without; mend it")


def _add_turn(row: TokenRow, pieces: Sequence[Segment], tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens of what the policy writes at a stretch."""
    label_of_character = [_INDEX[piece.label] for piece in pieces for _ in piece.text]
    encoded = tokenizer("".join(piece.text for piece in pieces), add_special_tokens=False, return_offsets_mapping=True)
    row.token_ids += encoded.input_ids
    row.labels += [label_of_character[min(start, len(label_of_character) - 1)] for start, _ in encoded.offset_mapping]


def _question(demonstration: Demonstration) -> str:
    return repr(demonstration.messages[-1]["content"][:60])
