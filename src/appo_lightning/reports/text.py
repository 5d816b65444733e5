"""A rollout tree as plain text: what was asked, what each root did, where branches left it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from appo_lightning.function_calls import CALL_CLOSE, CALL_OPEN, RESPONSE_CLOSE, RESPONSE_OPEN
from appo_lightning.types import Branch, RolloutTree, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Control characters but the tab, directions of writing, halves of surrogate pairs: they garble a page or a terminal.
_UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# What is left of a chat template's turns without their special tokens: a role on a line of its own.
_ROLE = re.compile(rf"\n\w+\n(?={RESPONSE_OPEN})|(?<={RESPONSE_CLOSE})\n\w+(?=\n)")
_FUNCTION_CALL = re.compile(
    rf"\s*({CALL_OPEN}|{RESPONSE_OPEN})\s*((?:(?!{CALL_OPEN}).)*?)\s*({CALL_CLOSE}|{RESPONSE_CLOSE})\s*", re.DOTALL
)


def render_tree(tree: RolloutTree, tokenizer: PreTrainedTokenizerBase, *, max_roots: int = 2) -> str:
    """One task with its rollouts; a branch shows the end of the prefix that it shares, and its own continuation.

    Args:
        tree: scored.
        tokenizer: the policy's.
        max_roots: roots shown; first those with a branch that ended otherwise, then those with any branch.
    """
    question = tree.task.question or str(tokenizer.decode(tree.task.prompt_ids, skip_special_tokens=True)).strip()
    answers = " | ".join(" ".join(_lines(reference)) for reference in tree.task.references)
    lines = [f"task {tree.task.id}   answer: {answers}", *_indent(question, "  ")]
    order = sorted(range(len(tree.roots)), key=lambda n: _interest(tree, n), reverse=True)[:max_roots]
    for n in order:
        lines += ["", f"root {n}   {_outcome(tree.roots[n])}"]
        lines += _indent(_by_turns(tree.roots[n].response_text, tree.roots[n]), "  │ ")
        own = [branch for branch in tree.branches if branch.point.root == n]
        for branch in sorted(own, key=lambda b: b.point.position):
            lines += _branch_lines(branch, tokenizer)
    hidden = len(tree.roots) - len(order)
    if hidden:
        lines += ["", f"({hidden} more root{'s' if hidden > 1 else ''})"]
    return "\n".join(lines)


def most_telling(trees: Sequence[RolloutTree]) -> RolloutTree:
    """The tree to show of a batch: one whose rollouts earned most differently, then one with many tool calls."""

    def interest(tree: RolloutTree) -> tuple[float, int]:
        rollouts = [*tree.roots, *(branch.trajectory for branch in tree.branches)]
        disagreeing = max((_interest(tree, n)[0] for n in range(len(tree.roots))), default=0.0)
        return disagreeing, sum(len(rollout.tool_calls) for rollout in rollouts)

    return max(trees, key=interest)


def _interest(tree: RolloutTree, root: int) -> tuple[float, int]:
    """How far the rewards of a root and its branches lie apart, and how many branches it has."""
    own = [branch.trajectory for branch in tree.branches if branch.point.root == root]
    rewards = [rollout.reward or 0.0 for rollout in (tree.roots[root], *own)]
    return max(rewards) - min(rewards), len(own)


def _branch_lines(branch: Branch, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    ids, start = branch.trajectory.response_ids, branch.prefix_length
    shared = str(tokenizer.decode(ids[max(0, start - 8) : start], skip_special_tokens=True))
    own = str(tokenizer.decode(ids[start:], skip_special_tokens=True))
    head = f"  ├─ branch after token {start}   score {branch.point.score:.2f}   {_outcome(branch.trajectory)}"
    return [head, *_indent(_by_turns(f"…{shared}⎇{own}", branch.trajectory), "  │    ")]


def _outcome(trajectory: Trajectory) -> str:
    reward = "not scored" if trajectory.reward is None else f"reward {trajectory.reward:.2f}"
    calls = len(trajectory.tool_calls)
    return f"{reward}   {len(trajectory.response_ids)} tokens   {calls} tool call{'' if calls == 1 else 's'}"


def _by_turns(text: str, trajectory: Trajectory) -> str:
    """A line break before each call, result and answer; a function call and its tags on one line."""
    text = _FUNCTION_CALL.sub(r"\n\1\2\3\n", _ROLE.sub("\n", text))
    for name in dict.fromkeys([*(call.name for call in trajectory.tool_calls), "result", "answer"]):
        text = text.replace(f"<{name}>", f"\n<{name}>")
    return text.replace("</result>", "</result>\n").strip()


def _indent(text: str, by: str) -> list[str]:
    return [by + line for line in _lines(text)]


def _lines(text: str) -> list[str]:
    return [_UNREADABLE.sub("\ufffd", line) for line in text.splitlines() if line.strip()]
