"""Responses in tags: ``<think>``, tool calls with their ``<result>``, and one ``<answer>`` with ``\\boxed{...}``."""

from __future__ import annotations

import functools
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.function_calls import CALL_CLOSE, CALL_OPEN, RESPONSE_CLOSE, RESPONSE_OPEN, read_calls
from appo_lightning.rewards.answers import answer_f1
from appo_lightning.rewards.base import Reward, Score
from appo_lightning.types import Task

CallFormatName = Literal["tags", "hermes"]

_BOX = "\\boxed{"
_RESPONSES = re.compile(rf"{RESPONSE_OPEN}.*?{RESPONSE_CLOSE}(?:\s*{RESPONSE_OPEN}.*?{RESPONSE_CLOSE})*", re.DOTALL)
_CALLS = re.compile(rf"{CALL_OPEN}.*{CALL_CLOSE}", re.DOTALL)


@dataclass(slots=True)
class TaggedResponse:
    """What a tagged response says, or how it breaks the format."""

    answer: str = ""  # content of the last box in the answer; empty where the format is broken
    tools_used: set[str] = field(default_factory=set)  # tools whose call was closed and answered by a result
    violation: str | None = None  # the first rule broken; None: well formed


def read_tagged_response(text: str, tools: Sequence[str], call_format: CallFormatName = "tags") -> TaggedResponse:
    r"""Read the answer and the tools used, or the first rule that the response breaks.

    1. Every call ``<tool>...</tool>`` is closed and followed by its own complete ``<result>...</result>``; as a JSON
       function call it is one of ``<tool_call>...</tool_call>`` followed by as many complete
       ``<tool_response>...</tool_response>``.
    2. ``<think>`` appears and is closed as often as opened.
    3. There is exactly one ``<answer>``, closed, and it holds a ``\boxed{...}`` with balanced braces.
    Tool results are set aside first: the policy did not write the tags inside a retrieved page.
    Source: APPO (arXiv 2606.12384), format rule of the published reward.

    Args:
        text: decoded response, tags and tool results included.
        tools: tag names of the tools.
        call_format: how calls are written.
    """
    set_aside = _set_responses_aside if call_format == "hermes" else _set_results_aside
    own_text, tools_used, violation = set_aside(text, tools)
    if violation:
        return TaggedResponse(tools_used=tools_used, violation=violation)
    opened, closed = own_text.count("<think>"), own_text.count("</think>")
    if opened == 0 or opened != closed:
        return TaggedResponse(tools_used=tools_used, violation=f"{opened} <think> and {closed} </think>")
    if own_text.count("<answer>") != 1 or own_text.count("</answer>") != 1:
        return TaggedResponse(tools_used=tools_used, violation="not exactly one <answer>")
    start, stop = own_text.index("<answer>") + len("<answer>"), own_text.index("</answer>")
    answer = last_boxed(own_text[start:stop]) if start <= stop else None
    if answer is None:
        return TaggedResponse(tools_used=tools_used, violation="no \\boxed{...} inside <answer>...</answer>")
    return TaggedResponse(answer=answer, tools_used=tools_used)


def last_boxed(text: str) -> str | None:
    r"""Return what the last ``\boxed{`` holds to its matching brace, None without one; ``\{`` and ``\}`` are text."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth, position = 1, start + len(_BOX)
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start + len(_BOX) : position]
        position += 1
    return None


class TaggedReward(Reward):
    """Grades the boxed answer of a tagged response; punishes a broken format, rewards the use of every bonus tool.

    format_penalty                if the format is broken, see ``read_tagged_response``
    grade + tool_bonus            if grade > 0 and every bonus tool was called and answered
    grade                         otherwise
    Source: APPO (arXiv 2606.12384), published reward.

    Args:
        format_penalty: value of a response in broken format, <= 0.
        tool_bonus: added to a grade above 0, >= 0; 0 switches it off.
        bonus_tools: tools that must all have answered for the bonus.
        tools: tag names whose calls must be answered by a result; holds every bonus tool.
        success_threshold: grade from which a response counts as a success, in (0, 1].
        call_format: how calls are written: "tags", or "hermes" beside ``data.call_format: HermesFormat``.

    Raises:
        ConfigurationError: an option is out of range or has no effect.
    """

    grade_name = "grade"  # name of the grade among the score's parts

    def __init__(
        self,
        format_penalty: float = -1.0,
        tool_bonus: float = 0.1,
        bonus_tools: Sequence[str] = ("search", "python"),
        tools: Sequence[str] = ("search", "python"),
        success_threshold: float = 1.0,
        call_format: CallFormatName = "tags",
    ) -> None:
        if not format_penalty <= 0:
            raise ConfigurationError(f"format_penalty must be <= 0, got {format_penalty}: use -1, or 0 for none")
        if not tool_bonus >= 0:
            raise ConfigurationError(f"tool_bonus must be >= 0, got {tool_bonus}: use 0.1, or 0 for none")
        if tool_bonus > 0 and not bonus_tools:
            raise ConfigurationError("tool_bonus has no effect without bonus_tools, got none: name them or use 0")
        if not set(bonus_tools) <= set(tools):
            raise ConfigurationError(
                f"bonus_tools must be among tools {list(tools)}, got {list(bonus_tools)}: add them"
            )
        if not 0 < success_threshold <= 1:
            raise ConfigurationError(f"success_threshold must be in (0, 1], got {success_threshold}: use 1")
        self.format_penalty = format_penalty
        self.tool_bonus = tool_bonus
        self.bonus_tools = frozenset(bonus_tools)
        self.tools = tuple(tools)
        self.success_threshold = success_threshold
        self.call_format: CallFormatName = call_format

    @abstractmethod
    def grade(self, answer: str, references: Sequence[str]) -> float:
        """Grade the boxed answer in [0, 1]; must not raise on any text."""

    def score(self, task: Task, response_text: str) -> Score:
        """Score the response; parts are the grade, ``format`` (1 well formed, 0 broken) and ``tool_bonus``."""
        if not task.references:
            raise DataError(f"task {task.id} must have a reference answer, got none: add one or drop the row")
        response = read_tagged_response(response_text, self.tools, self.call_format)
        if response.violation is not None:
            return Score(self.format_penalty, False, {self.grade_name: 0.0, "format": 0.0, "tool_bonus": 0.0})
        grade = self.grade(response.answer, task.references)
        # Tools earn nothing on a wrong answer: calling them for the bonus alone must not pay.
        bonus = self.tool_bonus if grade > 0 and self.bonus_tools <= response.tools_used else 0.0
        parts = {self.grade_name: grade, "format": 1.0, "tool_bonus": bonus}
        return Score(grade + bonus, grade >= self.success_threshold, parts)


class AnswerReward(TaggedReward):
    """Word F1 of the boxed answer against the best accepted answer, by the tagged rule of ``TaggedReward``."""

    grade_name = "f1"

    def grade(self, answer: str, references: Sequence[str]) -> float:
        """Return the F1 of the answer, 0 where it is empty."""
        return answer_f1(answer, references)


def _set_results_aside(text: str, tools: Sequence[str]) -> tuple[str, set[str], str | None]:
    """Cut the tool results out; return what the policy wrote, the tools that answered and the first open call."""
    if not tools:
        return text, set(), None
    call, result = _openings(tuple(tools))
    own_text: list[str] = []
    answered: set[str] = set()
    position = 0
    while opening := call.search(text, position):
        tool = opening[1]
        closing = text.find(f"</{tool}>", opening.end())
        if closing < 0:
            return text, answered, f"<{tool}> is never closed"
        following = result.search(text, closing)
        stop = text.find("</result>", following.end()) if following else -1
        if following is None or following[0] != "<result>" or stop < 0:
            return text, answered, f"<{tool}> has no complete <result>"
        own_text.append(text[position : following.start()])
        answered.add(tool)
        position = stop + len("</result>")
    own_text.append(text[position:])
    return "".join(own_text), answered, None


@functools.lru_cache
def _openings(tools: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What opens a call, and what opens a call or a result."""
    call = re.compile("<(" + "|".join(re.escape(tool) for tool in tools) + ")>")
    return call, re.compile(f"<result>|{call.pattern}")


def _set_responses_aside(text: str, tools: Sequence[str]) -> tuple[str, set[str], str | None]:
    """The same for JSON function calls: between two blocks of responses stand the turns of the policy."""
    own_text: list[str] = []
    answered: set[str] = set()
    position = 0
    # Behind the last closing tag nothing can match: thousands of opening tags there would be tried in vain.
    end = max(0, text.rfind(RESPONSE_CLOSE)) + len(RESPONSE_CLOSE)
    for block in [*_RESPONSES.finditer(text, 0, end), None]:
        turn = text[position : len(text) if block is None else block.start()]
        calls = read_calls(turn)
        if len(calls) > (0 if block is None else block.group().count(RESPONSE_OPEN)):
            return text, answered, f"{len(calls)} function calls without as many complete {RESPONSE_OPEN}"
        own_text.append(_CALLS.sub("", turn))
        answered |= {call.name for call in calls if call.arguments is not None} & set(tools)
        position = len(text) if block is None else block.end()
    return "".join(own_text), answered, None
