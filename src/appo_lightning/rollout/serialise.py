"""Trajectories as plain containers: in checkpoints, in JSONL files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from appo_lightning.types import Branch, BranchPoint, RolloutTree, ToolCall, Trajectory

_PER_TOKEN: dict[str, type[np.generic]] = {
    "prompt_ids": np.int32,
    "response_ids": np.int32,
    "sampled": np.bool_,
    "behaviour_logprobs": np.float64,
}


def trajectory_to_dict(trajectory: Trajectory) -> dict[str, Any]:
    """Every field."""
    # Not asdict: it would copy every token by itself, seconds for the rollouts of one phase.
    state = _fields_of(trajectory)
    state["tool_calls"] = [_fields_of(call) for call in trajectory.tool_calls]
    return state


def trajectories_to_state(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """A few tensors and the rest as JSON, for a checkpoint; loaded back by ``trajectories_from_state``."""
    # Not as they are: torch.save asks a Python function about every number and text that it meets.
    rows = [trajectory_to_dict(trajectory) for trajectory in trajectories]
    state: dict[str, Any] = {}
    for name, dtype in _PER_TOKEN.items():
        lists = [row.pop(name) for row in rows]
        values = torch.from_numpy(np.fromiter(chain.from_iterable(lists), dtype))
        state[name] = {"lengths": torch.tensor([len(numbers) for numbers in lists]), "values": values}
    return {"rows": json.dumps(rows, default=float), **state}  # parts of a reward may be numbers of NumPy


def trajectories_from_state(state: dict[str, Any]) -> list[Trajectory]:
    """The trajectories that ``trajectories_to_state`` described."""
    columns = {name: _lists(state[name]) for name in _PER_TOKEN}
    trajectories = []
    for row in json.loads(state["rows"]):
        numbers = {name: next(lists) for name, lists in columns.items()}
        calls = [ToolCall(**call) for call in row["tool_calls"]]
        trajectories.append(Trajectory(**{**row, **numbers, "tool_calls": calls}))
    return trajectories


def _lists(state: dict[str, Any]) -> Iterator[list[Any]]:
    values = iter(state["values"].tolist())
    return (list(islice(values, length)) for length in state["lengths"].tolist())


def tree_to_dict(tree: RolloutTree) -> dict[str, Any]:
    """One line of a rollout file: the task, its roots and branches."""
    return {
        "task": tree.task.id,
        "references": list(tree.task.references),
        "prompt_ids": tree.task.prompt_ids,
        "roots": [_without_prompt(root) for root in tree.roots],
        "branches": [
            {**_fields_of(branch.point), "prefix_length": branch.prefix_length, **_without_prompt(branch.trajectory)}
            for branch in tree.branches
        ],
    }


def branches_to_state(branches: Sequence[Branch]) -> dict[str, Any]:
    """As ``trajectories_to_state``; loaded back by ``branches_from_state``."""
    return {
        "points": [_fields_of(branch.point) for branch in branches],
        "prefix_lengths": [branch.prefix_length for branch in branches],
        "trajectories": trajectories_to_state([branch.trajectory for branch in branches]),
    }


def branches_from_state(state: dict[str, Any]) -> list[Branch]:
    """The branches that ``branches_to_state`` described."""
    points = [BranchPoint(**point) for point in state["points"]]
    return list(map(Branch, points, trajectories_from_state(state["trajectories"]), state["prefix_lengths"]))


def _without_prompt(trajectory: Trajectory) -> dict[str, Any]:
    state = trajectory_to_dict(trajectory)
    del state["prompt_ids"]
    return state


def _fields_of(value: Trajectory | ToolCall | BranchPoint) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}
