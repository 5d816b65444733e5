"""A rollout tree as plain text: what was asked, what each root did, where branches left it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from appo_lightning.types import Branch, RolloutTree, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_tree(tree: RolloutTree, tokenizer: PreTrainedTokenizerBase, *, max_roots: int = 2) -> str:
    """One task with its rollouts; a branch shows the end of the prefix that it shares, and its own continuation.

    Args:
        tree: scored.
        tokenizer: the policy's.
        max_roots: roots shown; those with branches come first.
    """
    question = str(tokenizer.decode(tree.task.prompt_ids, skip_special_tokens=True)).strip()
    lines = [f"task {tree.task.id}   answer: {' | '.join(tree.task.references)}", *_indent(question, "  ")]
    branched = {branch.point.root for branch in tree.branches}
    order = sorted(range(len(tree.roots)), key=lambda n: (n not in branched, n))[:max_roots]
    for n in order:
        lines += ["", f"root {n}   {_outcome(tree.roots[n])}"]
        lines += _indent(_readable(tree.roots[n].response_text), "  │ ")
        own = [branch for branch in tree.branches if branch.point.root == n]
        for branch in sorted(own, key=lambda b: b.point.position):
            lines += _branch_lines(branch, tokenizer)
    hidden = len(tree.roots) - len(order)
    if hidden:
        lines += ["", f"({hidden} more root{'s' if hidden > 1 else ''})"]
    return "\n".join(lines)


def _branch_lines(branch: Branch, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    ids, start = branch.trajectory.response_ids, branch.prefix_length
    shared = str(tokenizer.decode(ids[max(0, start - 8) : start], skip_special_tokens=True))
    own = str(tokenizer.decode(ids[start:], skip_special_tokens=True))
    head = f"  ├─ branch after token {start}   score {branch.point.score:.2f}   {_outcome(branch.trajectory)}"
    return [head, *_indent(_readable(f"…{shared}⎇{own}"), "  │    ")]


def _outcome(trajectory: Trajectory) -> str:
    reward = "not scored" if trajectory.reward is None else f"reward {trajectory.reward:.2f}"
    calls = len(trajectory.tool_calls)
    return f"{reward}   {len(trajectory.response_ids)} tokens   {calls} tool call{'' if calls == 1 else 's'}"


def _readable(text: str) -> str:
    """A line break before each turn."""
    for tag in ("<search>", "<python>", "<result>", "<answer>"):
        text = text.replace(tag, f"\n{tag}")
    return text.replace("</result>", "</result>\n").strip()


def _indent(text: str, by: str) -> list[str]:
    return [by + line for line in text.splitlines() if line.strip()]
