"""JSON function calls in text: ``<tool_call>{"name": "search", "arguments": {"query": "..."}}</tool_call>``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<tool_response>", "</tool_response>"
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_FORM = 'expected one JSON object {"name": ..., "arguments": {...}}'
_MARK = re.compile(f"{CALL_OPEN}|{CALL_CLOSE}")
_SPACE = re.compile(r"\s*")
_JSON = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A call as it was written."""

    name: str = ""  # "" where it cannot be read
    arguments: dict[str, Any] | None = None  # None: malformed
    problem: str = ""  # what is wrong with a malformed one; holds no tags


def read_calls(text: str) -> list[FunctionCall]:
    """Every call of a text, malformed ones too, in order; never raises.

    A call inside a thought is none: the policy thinks about it. The JSON is read to its end, so that a string of it may
    hold a closing tag.
    """
    text = without_thoughts(text)
    calls: list[FunctionCall] = []
    position = 0
    while mark := _MARK.search(text, position):
        if mark.group() == CALL_CLOSE:
            calls.append(FunctionCall(problem=f"a closing tag without an opening tag; {_FORM} between the two"))
            position = mark.end()
        else:
            call, position = _read_call(text, mark.end())
            calls.append(call)
    return calls


def without_thoughts(text: str) -> str:
    """The text without what stands between think tags. One that is opened in the prompt ends at the first closing tag,
    one that is never closed is no thought.
    """
    first_close = text.find(_THINK_CLOSE)
    opens_itself = 0 <= text.find(_THINK_OPEN) < first_close
    position = 0 if first_close < 0 or opens_itself else first_close + len(_THINK_CLOSE)
    spoken = []
    while (start := text.find(_THINK_OPEN, position)) >= 0 and (stop := text.find(_THINK_CLOSE, start)) >= 0:
        spoken.append(text[position:start])
        position = stop + len(_THINK_CLOSE)
    return "".join([*spoken, text[position:]])


def _read_call(text: str, start: int) -> tuple[FunctionCall, int]:
    """The call whose opening tag ends at ``start``, and where to read on."""
    begin = _end_of_space(text, start)
    try:
        value, stop = _JSON.raw_decode(text, begin)
    except json.JSONDecodeError as error:
        place = _excerpt(text, error.pos)
        found = f"at character {error.pos - begin} ({place!r})" if place else "at its end"
        return FunctionCall(problem=f"{error.msg.removesuffix(' at')} {found}; {_FORM}"), _next_call(text, start)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        return FunctionCall(problem=f"{type(error).__name__} in its JSON; {_FORM}"), _next_call(text, start)
    stop = _end_of_space(text, stop)
    if not text.startswith(CALL_CLOSE, stop):
        rest = _excerpt(text, stop)
        found = f"{rest!r} behind the JSON" if rest else "no closing tag"
        return FunctionCall(problem=f"{found}; {_FORM} and the closing tag"), _next_call(text, stop)
    return _checked(value), stop + len(CALL_CLOSE)


def _checked(value: Any) -> FunctionCall:
    if not isinstance(value, dict):
        return FunctionCall(problem=f"{_kind(value)}; {_FORM}")
    name = value.get("name")
    if not isinstance(name, str):
        return FunctionCall(problem=f"{'name is ' + _kind(name) if 'name' in value else 'no name'}; {_FORM}")
    arguments = value.get("arguments")
    if not isinstance(arguments, dict):
        found = f"arguments is {_kind(arguments)}" if "arguments" in value else "no arguments"
        return FunctionCall(name, problem=f"{found}; {_FORM}")
    return FunctionCall(name, arguments)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _excerpt(text: str, start: int) -> str:
    """A few characters, none of a tag: a message must not hold one."""
    mark = _MARK.search(text, start)
    return text[start : len(text) if mark is None else mark.start()][:20]


def _end_of_space(text: str, start: int) -> int:
    space = _SPACE.match(text, start)
    assert space is not None
    return space.end()


def _next_call(text: str, start: int) -> int:
    """Behind the closing tag of a malformed call, or before the next opening tag if that comes first."""
    mark = _MARK.search(text, start)
    if mark is None:
        return len(text)
    return mark.end() if mark.group() == CALL_CLOSE else mark.start()
