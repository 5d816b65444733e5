"""Signs that a policy plays with its tools or its reward, or that a page plays with the policy."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L

from appo_lightning.batching import ProcedureBatch
from appo_lightning.datamodule import RolloutDataModule
from appo_lightning.errors import ConfigurationError
from appo_lightning.metrics import MetricSums, log_metrics
from appo_lightning.rollout.formats.tags import CONTROL_TAGS
from appo_lightning.rollout.serialise import trajectory_to_dict
from appo_lightning.tools.base import Tool
from appo_lightning.types import RolloutTree, ToolCall, Trajectory

_PER_ALARM = 3  # rollouts kept of a step at which an alarm starts
_NOTHING = re.compile(r'null|\[\]|\{\}|"(\s|\\[nrtf])*"')  # as JSON
Wire = Literal["control_tags", "empty_calls", "repeated_calls", "tool_spam", "form_alone"]


@dataclass
class AlarmRates:
    """Shares of rollouts above which a tripwire warns.

    Args:
        control_tags: a tool result held a tag or special token that was not in the call; it was broken up before the
            policy read it.
        empty_calls: a call without an argument that its tool needs, or with a JSON object of nothing but empty values.
        repeated_calls: a call with the same argument as an earlier one of the same rollout; JSON objects are the same
            whatever the order of their fields.
        tool_spam: a call beyond ``data.rollout.max_tool_calls``.
        form_alone: a reward above ``reward_above`` without success and without a part of substance.
    """

    control_tags: float = 0.02
    empty_calls: float = 0.2
    repeated_calls: float = 0.5
    tool_spam: float = 0.5
    form_alone: float = 0.2


class Tripwires(L.Callback):
    """Counts suspicious rollouts, warns when there are many, and keeps some of them to look at.

    ``tripwires.jsonl`` in the log directory gets a line per kept rollout; each further process adds its rank to the
    name.

    Args:
        alarms: shares of the rollouts of a mini-batch, branches too, above which it warns.
        keep: the first rollouts kept for each tripwire, per process; 0 keeps none. Where an alarm starts later, some of
            its step are kept as well.
        reward_above: ``form_alone``: a larger reward is suspicious without success.
        form_parts: ``form_alone``: parts of the reward that only say how a response looks. Where another part is above
            0, a reward was earned by more than form.
    """

    def __init__(
        self,
        alarms: AlarmRates = AlarmRates(),  # noqa: B008  # jsonargparse shows it; never mutated
        keep: int = 20,
        reward_above: float = 0.0,
        form_parts: Sequence[str] = ("format", "tool_bonus"),
    ) -> None:
        for wire in get_args(Wire):
            if not 0 <= getattr(alarms, wire) <= 1:
                raise ConfigurationError(f"tripwires.alarms.{wire} must be in [0, 1], got {getattr(alarms, wire)}")
        if keep < 0:
            raise ConfigurationError(f"tripwires.keep must be at least 0, got {keep}")
        self.alarms, self.keep, self.reward_above = alarms, keep, reward_above
        self.form_parts = frozenset(form_parts)
        self._file: Path | None = None
        self._kept: Counter[str] = Counter()
        self._ringing: set[str] = set()
        self._marks: re.Pattern[str] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: RolloutDataModule = trainer.datamodule  # type: ignore[attr-defined]
        module: Any = pl_module
        self._marks = control_marks(
            [*data.call_format.control_tags, *(tool.name for tool in data.tools)], module.policy.tokenizer
        )
        directory = trainer.log_dir  # collective
        if directory is not None:
            suffix = f".rank{trainer.global_rank}" if trainer.global_rank else ""
            self._file = Path(directory) / f"tripwires{suffix}.jsonl"
            if self._file.is_file():  # of the run that this one continues
                self._kept.update(json.loads(line)["tripwire"] for line in self._file.read_text().splitlines())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: ProcedureBatch, batch_idx: int
    ) -> None:
        data: RolloutDataModule = trainer.datamodule  # type: ignore[attr-defined]
        tests = self._tests(data.tools)
        rollouts = [
            (tree, rollout)
            for tree in batch.trees
            for rollout in [*tree.roots, *(branch.trajectory for branch in tree.branches)]
        ]
        offenders = [
            (wire, tree, rollout) for tree, rollout in rollouts for wire, test in tests.items() if test(rollout)
        ]
        tripped = Counter(wire for wire, _, _ in offenders)
        metrics = MetricSums()
        for wire in tests:
            metrics.add_sum(f"tripwire/{wire}", tripped[wire], len(rollouts))
        means = log_metrics(trainer, metrics)
        starting = self._starting(means)  # the same on every process
        self._keep(offenders, starting, trainer.global_step)
        if trainer.is_global_zero:
            for wire in starting:
                self._warn(wire, means[f"tripwire/{wire}"], trainer.global_step)

    def _tests(self, tools: Sequence[Tool]) -> dict[Wire, Callable[[Trajectory], bool]]:
        marks, optional = self._marks, free_of_arguments(tools)
        assert marks is not None
        return {
            "control_tags": lambda rollout: any(speaks_for_the_policy(call, marks) for call in rollout.tool_calls),
            "empty_calls": lambda rollout: has_empty_call(rollout, optional),
            "repeated_calls": has_repeated_call,
            "tool_spam": lambda rollout: any(call.error == "limit" for call in rollout.tool_calls),
            "form_alone": lambda rollout: earned_by_form_alone(rollout, self.reward_above, self.form_parts),
        }

    def _starting(self, means: dict[str, float]) -> list[Wire]:
        """Tripwires whose rate has risen above its threshold, and not again before it has fallen below."""
        above = {wire for wire in get_args(Wire) if means.get(f"tripwire/{wire}", 0.0) > getattr(self.alarms, wire)}
        starting = [wire for wire in get_args(Wire) if wire in above - self._ringing]
        self._ringing = above
        return starting

    def _warn(self, wire: str, rate: float, step: int) -> None:
        where = f"; some are in {self._file}" if self._file is not None and self.keep else ""
        threshold = getattr(self.alarms, wire)
        warnings.warn(
            f"tripwire {wire}: {rate:.1%} of the rollouts of step {step}, alarm at {threshold:.1%}{where}",
            stacklevel=2,
        )

    def _keep(self, offenders: Sequence[tuple[Wire, RolloutTree, Trajectory]], starting: list[Wire], step: int) -> None:
        """Write the first offenders of the run, and some of the step where an alarm starts, however late."""
        if self._file is None:
            return
        room = {wire: self.keep - self._kept[wire] for wire in get_args(Wire)}
        room |= {wire: max(room[wire], min(_PER_ALARM, self.keep)) for wire in starting}
        lines = []
        for wire, tree, rollout in offenders:
            if room[wire] > 0:
                room[wire] -= 1
                self._kept[wire] += 1
                line = {"tripwire": wire, "step": step, "task": tree.task.id, "references": list(tree.task.references)}
                lines.append(json.dumps(line | trajectory_to_dict(rollout)) + "\n")
        if lines:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.writelines(lines)


def control_marks(tools: Sequence[str], tokenizer: Any) -> re.Pattern[str]:
    """What is left in a result of a tag or special token that was broken up: a space behind its first character."""
    tags = [f"{slash}{tag}>" for tag in dict.fromkeys([*CONTROL_TAGS, *tools]) for slash in ("", "/")]
    marks = [f"<{tag}" for tag in tags] + [token for token in tokenizer.all_special_tokens if len(token) > 1]
    return re.compile("|".join(rf"{re.escape(mark[0])}\s+{re.escape(mark[1:])}" for mark in marks))


def speaks_for_the_policy(call: ToolCall, marks: re.Pattern[str]) -> bool:
    """Whether a result held a tag or special token that does not stand in the argument, which many tools quote."""
    if not marks.search(call.result):  # nearly always
        return False
    if not _reached_its_tool(call):  # what the policy read is no tool's answer
        return False
    held = {match.group()[0] + match.group()[1:].lstrip() for match in marks.finditer(call.result)}
    # "<python>" is also where Python says an error stands; a call of another's making would be closed, too.
    return any(mark not in call.argument for mark in held - {f"<{call.name}>"})


def free_of_arguments(tools: Sequence[Tool]) -> list[str]:
    """Names of the tools that need no argument; some learn their schema only when a prompt shows it."""
    return [tool.name for tool in tools if not tool.schema.get("required")]


def has_empty_call(rollout: Trajectory, optional: Collection[str] = ()) -> bool:
    """Whether a call that reached its tool had no argument, or a JSON object of nothing but empty values.

    Args:
        rollout: any.
        optional: names of the tools that need no argument.
    """
    return any(
        _is_empty(call.argument) for call in rollout.tool_calls if _reached_its_tool(call) and call.name not in optional
    )


def has_repeated_call(rollout: Trajectory) -> bool:
    """Whether the same argument went to the same tool twice."""
    calls = [(call.name, _content(call.argument)) for call in rollout.tool_calls if _reached_its_tool(call)]
    return len(set(calls)) < len(calls)


def _reached_its_tool(call: ToolCall) -> bool:
    """Whether the tool answered, if only that the argument does not fit; the loop itself says "malformed call: ..."."""
    if call.error == "malformed":  # the loop's own has no argument; its text may be cut where the response ends
        return bool(call.argument) or call.result.startswith("malformed:")
    return call.error != "limit"


def _is_empty(argument: str) -> bool:
    content = _content(argument)
    if isinstance(content, str):
        return not content.strip()
    return all(_NOTHING.fullmatch(value) for _, value in content)


def _content(argument: str) -> str | frozenset[tuple[str, str]]:
    """The fields of a JSON object, each value in one spelling; any other argument as it is."""
    if not argument.lstrip().startswith("{"):
        return argument
    try:
        fields = json.loads(argument)
        if isinstance(fields, dict):
            return frozenset((name, json.dumps(value, sort_keys=True)) for name, value in fields.items())
    except (ValueError, RecursionError):  # a policy writes anything
        pass
    return argument


def earned_by_form_alone(rollout: Trajectory, reward_above: float, form_parts: frozenset[str]) -> bool:
    """Whether a wrong answer earned more than ``reward_above``, and nothing but its form explains it."""
    if rollout.success or rollout.reward is None or rollout.reward <= reward_above:
        return False
    return all(value <= 0 for name, value in rollout.reward_parts.items() if name not in form_parts)
