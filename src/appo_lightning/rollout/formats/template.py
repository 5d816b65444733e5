"""What a chat template writes around tool results, found by rendering conversations; and what it must not do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from appo_lightning.errors import ConfigurationError
from appo_lightning.function_calls import CALL_CLOSE, CALL_OPEN, read_calls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAGS_REMEDY = "leave data.call_format out (tags), or give the tokenizer a template of the Qwen or Hermes kind"
_KEEP_REMEDY = (
    "give the tokenizer a template that keeps earlier turns as they were written, leave data.call_format out (tags), "
    "or accept the difference with data.call_format.init_args.allow_rewritten_history: true"
)

_NAME, _DESCRIPTION = "probe_tool", "Probes the template."
_SCHEMA = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": _DESCRIPTION,
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}
# Its keys are in no order, its text has quotes, a line break and letters beyond ASCII: whoever writes it anew shows.
_ARGUMENTS = {"query": 'probe "é"\n<b>', "limit": [1, 2.5], "exact": True}
_QUESTION = {"role": "user", "content": "probe question"}
_THOUGHTS = ("first probe thought", "second probe thought")


@dataclass(frozen=True, slots=True)
class ResultFrame:
    """Text around the results of a turn; the policy's end-of-turn token stands before it and was sampled."""

    opening: str  # up to the first result
    between: str  # two results of the same turn
    closing: str  # up to where the policy goes on


def find_result_frame(tokenizer: PreTrainedTokenizerBase) -> ResultFrame:
    """Find what the template writes between the end of a turn and the next turn of the policy.

    The frame must not depend on what the policy wrote, nor on the number of results or turns: it is then right in every
    rollout, and no token is ever written anew.

    Raises:
        ConfigurationError: there is no template, or it has another form of calls, results or ends of turns.
    """
    if tokenizer.chat_template is None:
        raise _refused(tokenizer, "a chat template", "none", "use an instruction-tuned model")
    prompt = _render(tokenizer, [_QUESTION])
    if _NAME not in prompt or _DESCRIPTION not in prompt:
        raise _refused(tokenizer, "a chat template that shows tools to the model", "one that ignores them")
    frame = _frame_of(tokenizer, 2)
    for count in (1, 3):
        if _frame_of(tokenizer, count) != frame:
            raise _refused(tokenizer, "the same text around any number of results", f"another for {count}")
    if _frame_of(tokenizer, 2, _THOUGHTS[0]) != frame:
        raise _refused(
            tokenizer, "the same text around results whatever the model wrote", "another after a turn with a thought"
        )
    later = _render(tokenizer, [_QUESTION, *_turn(1), *_turn(1, number=2)])
    if not later.endswith(f"{tokenizer.eos_token}{frame.opening}{_result(2, 1)['content']}{frame.closing}"):
        raise _refused(tokenizer, "the same text around the results of every turn", "another in the second turn")
    return frame


def check_history_is_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a conversation which goes on repeats its earlier turns as the model wrote them.

    Rollouts always do. A template that does not would show the trained model another history wherever it is used.

    Raises:
        ConfigurationError: thoughts are dropped, calls are written anew, or an earlier turn changes when a later comes.
    """
    one, both = _turn(1, _THOUGHTS[0]), _turn(1, _THOUGHTS[1], number=2)
    first = _render(tokenizer, [_QUESTION, *one])
    whole = _render(tokenizer, [_QUESTION, *one, *both])
    if any(thought not in whole for thought in _THOUGHTS):
        raise _refused(tokenizer, "earlier thoughts to stay in the history", "them dropped", _KEEP_REMEDY)
    if json.dumps(_ARGUMENTS, ensure_ascii=False) not in whole:
        written = first.rpartition(CALL_OPEN)[2].partition(CALL_CLOSE)[0]
        raise _refused(
            tokenizer, "the arguments of a call to stay as they were written", f"{written!r:.160}", _KEEP_REMEDY
        )
    if not (whole.startswith(first) and first.startswith(_render(tokenizer, [_QUESTION]))):
        raise _refused(
            tokenizer, "each turn to be added to the text before it", "earlier text changed by it", _KEEP_REMEDY
        )


def _frame_of(tokenizer: PreTrainedTokenizerBase, count: int, thought: str = "") -> ResultFrame:
    text = _render(tokenizer, [_QUESTION, *_turn(count, thought)])
    spoken, *rest = _split(text, [message["content"] for message in _turn(count)[1:]])
    if len(rest) != count:
        raise _refused(tokenizer, "a chat template that shows tool results as they are", "them missing or changed")
    question, _, answer = spoken.rpartition(_QUESTION["content"])
    calls = [(call.name, call.arguments) for call in read_calls(answer)]
    if not question or calls != [(_NAME, _ARGUMENTS)] * count:
        form = f'{CALL_OPEN}{{"name": ..., "arguments": {{...}}}}{CALL_CLOSE}'
        raise _refused(tokenizer, f"a chat template that writes calls as {form}", f"{answer!r:.160}")
    tail = answer.rpartition(CALL_CLOSE)[2]
    before, eos, opening = tail.partition(tokenizer.eos_token or "<|no end of turn|>")
    if not eos or before.strip():
        raise ConfigurationError(
            f"the chat template of {tokenizer.name_or_path!r}: expected turns to end with the tokenizer's EOS token "
            f"{tokenizer.eos_token!r}, found {tail[:40]!r}; set tokenizer.eos_token to what ends a turn and save the "
            "tokenizer again"
        )
    between = set(rest[:-1])
    if len(between) > 1 or any(_NAME in part for part in [opening, *rest]):
        raise _refused(tokenizer, "the same text around every result", "one that tells the tool or the place")
    return ResultFrame(opening, between.pop() if between else _frame_of(tokenizer, 2, thought).between, rest[-1])


def _split(text: str, bodies: Sequence[str]) -> list[str]:
    """The text before, between and behind the bodies; shorter where one does not occur exactly once, in order."""
    parts = [text]
    for body in bodies:
        if parts[-1].count(body) != 1:
            break
        parts[-1:] = parts[-1].split(body)
    return parts


def _turn(count: int, thought: str = "", number: int = 1) -> list[dict[str, Any]]:
    """A turn with calls, and their results."""
    calls = [
        {
            "type": "function",
            "id": _call_id(number, n),
            "function": {"name": _NAME, "arguments": _ARGUMENTS},
        }
        for n in range(1, count + 1)
    ]
    content = f"<think>\n{thought}\n</think>\n\n" if thought else ""
    assistant = {"role": "assistant", "content": content, "tool_calls": calls}
    return [assistant, *(_result(number, n) for n in range(1, count + 1))]


def _result(turn: int, n: int) -> dict[str, Any]:
    content = f'probe result {turn}-{n}: "é"\n  <b> & 7'
    return {"role": "tool", "name": _NAME, "tool_call_id": _call_id(turn, n), "content": content}


def _call_id(turn: int, n: int) -> str:
    return f"call{turn:03d}{n:02d}"  # nine letters and digits: some templates insist


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tools=[_SCHEMA], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template does: it is a program that came with the model
        raise _refused(
            tokenizer, "a chat template for conversations with tools", f"{type(error).__name__}: {error}"
        ) from error
    assert isinstance(text, str)
    return text


def _refused(
    tokenizer: PreTrainedTokenizerBase, expected: str, found: str, remedy: str = _TAGS_REMEDY
) -> ConfigurationError:
    return ConfigurationError(
        f"the chat template of {tokenizer.name_or_path!r}: expected {expected}, found {found}; {remedy}"
    )
