"""Trajectories as plain containers: in checkpoints, in JSONL files."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from appo_lightning.types import Branch, BranchPoint, RolloutTree, ToolCall, Trajectory


def trajectory_to_dict(trajectory: Trajectory) -> dict[str, Any]:
    """Every field; loaded back by ``trajectory_from_dict``."""
    # Not asdict: it would copy every token by itself, seconds for the rollouts of one phase.
    state = _fields_of(trajectory)
    state["tool_calls"] = [_fields_of(call) for call in trajectory.tool_calls]
    return state


def trajectory_from_dict(state: dict[str, Any]) -> Trajectory:
    """The trajectory that ``trajectory_to_dict`` described."""
    return Trajectory(**{**state, "tool_calls": [ToolCall(**call) for call in state["tool_calls"]]})


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


def branch_to_dict(branch: Branch) -> dict[str, Any]:
    """Every field; loaded back by ``branch_from_dict``."""
    return {
        "point": _fields_of(branch.point),
        "trajectory": trajectory_to_dict(branch.trajectory),
        "prefix_length": branch.prefix_length,
    }


def branch_from_dict(state: dict[str, Any]) -> Branch:
    """The branch that ``branch_to_dict`` described."""
    return Branch(
        BranchPoint(**state["point"]), trajectory_from_dict(state["trajectory"]), prefix_length=state["prefix_length"]
    )


def _without_prompt(trajectory: Trajectory) -> dict[str, Any]:
    state = trajectory_to_dict(trajectory)
    del state["prompt_ids"]
    return state


def _fields_of(value: Trajectory | ToolCall | BranchPoint) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}
