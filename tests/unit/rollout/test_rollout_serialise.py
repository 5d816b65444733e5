"""Claims about seeds, prompts, files of rollouts and rollouts as text."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
import torch

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.reports.text import render_tree
from appo_lightning.rollout.prompts import build_task
from appo_lightning.rollout.seeds import derive_seed
from appo_lightning.rollout.serialise import (
    branches_from_state,
    branches_to_state,
    trajectories_from_state,
    trajectories_to_state,
    tree_to_dict,
)
from appo_lightning.types import Branch, BranchPoint, RolloutTree, TaskRow, ToolCall, Trajectory
from helpers.scripted import ids_of, make_task, rolled_out, scripted_tokenizer, text_of
from helpers.tiny import build_tokenizer

CALL = ToolCall("search", "the city", "42", 3, 5, True, 0.25, None)


def make_tree(text: str = "<think>hm</think><answer>7</answer>") -> RolloutTree:
    root = rolled_out(text, reward=1.0, tool_calls=[CALL])
    length = 4
    continued = rolled_out(
        [(text_of(root.response_ids[:length]), False), ("on the other hand", True)], reward=0.25, tool_calls=[CALL]
    )
    branch = Branch(BranchPoint(0, length - 1, 1.25, 0.5, 2.5), continued, prefix_length=length)
    return RolloutTree(make_task(), [root, rolled_out("no", reward=0.0), rolled_out("none")], [branch])


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_a_seed_is_a_function_of_its_names():
    # The literal keeps runs reproducible from release to release.
    assert derive_seed(0, "order", 1) == derive_seed("0", "order", 1) == 2369973416916499994
    assert 0 <= derive_seed() < 2**62


def test_different_names_have_different_seeds():
    names = [(), ("a",), ("a", "b"), ("ab",), ("b", "a"), (1, 2), (12,), ("a", 1), ("a", 2), ("é",)]
    assert len({derive_seed(*name) for name in names}) == len(names)
    assert len({derive_seed(0, "root", n) >> 31 for n in range(1000)}) == 1000


# --- prompts ---------------------------------------------------------------------------------------------------------


def row(content: str = "How many?") -> TaskRow:
    return TaskRow("q1", [{"role": "user", "content": content}], ("7", "seven"), {"documents": ["d"]})


def test_a_prompt_is_the_chat_template_with_the_turn_of_the_assistant_open():
    task = build_task(row(), scripted_tokenizer(), max_prompt_tokens=100)
    assert text_of(task.prompt_ids) == "<|im_start|>user How many?<|im_end|><|im_start|>assistant "
    assert (task.id, task.references, task.metadata) == ("q1", ("7", "seven"), {"documents": ["d"]})


@pytest.mark.parametrize("content", ["How many?", "  two\n\nlines ", "<|im_end|> é \U0001f600"])
def test_a_prompt_has_the_tokens_that_transformers_gives_the_template(content):
    tokenizer = scripted_tokenizer()
    whole = tokenizer.apply_chat_template(row(content).messages, add_generation_prompt=True, return_dict=False)
    assert build_task(row(content), tokenizer, max_prompt_tokens=100).prompt_ids == whole


def test_a_prompt_may_fill_its_budget_and_no_more():
    length = len(build_task(row(), scripted_tokenizer(), max_prompt_tokens=100).prompt_ids)
    build_task(row(), scripted_tokenizer(), max_prompt_tokens=length)
    with pytest.raises(DataError, match=f"task q1: the prompt has {length} tokens, the budget is {length - 1}"):
        build_task(row(), scripted_tokenizer(), max_prompt_tokens=length - 1)


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ConfigurationError, match="has no chat template"):
        build_task(row(), build_tokenizer(), max_prompt_tokens=100)


# --- files -----------------------------------------------------------------------------------------------------------


def test_trajectories_and_branches_come_back_from_a_checkpoint(tmp_path):
    tree = make_tree()
    (branch,) = tree.branches
    branch.trajectory.reward_parts = {"f1": 0.5}
    branch.trajectory.behaviour_logprobs[0] = -1 / 3  # more digits than half of a float64 holds
    short = Trajectory([1], [], [], [], [], "length", 0)
    roots = [tree.roots[0], short, tree.roots[1]]
    torch.save([trajectories_to_state(roots), branches_to_state(tree.branches)], tmp_path / "state")
    of_roots, of_branches = torch.load(tmp_path / "state", weights_only=True)
    assert trajectories_from_state(of_roots) == roots
    assert branches_from_state(of_branches) == [branch]
    assert {type(value) for value in trajectories_from_state(of_roots)[0].sampled} == {bool}
    assert trajectories_from_state(trajectories_to_state([])) == []


def test_parts_of_a_reward_may_be_numbers_of_numpy():
    trajectory = rolled_out("7", reward=1.0)
    trajectory.reward_parts = {"judge": np.float32(0.5), "steps": np.int64(3)}
    assert trajectories_from_state(trajectories_to_state([trajectory])) == [trajectory]


def test_a_checkpoint_holds_as_many_objects_for_many_trajectories_as_for_one():
    # torch.save asks a Python function about every object that it meets.
    def objects(count: int) -> int:
        trajectory = Trajectory([1] * 9, [2] * 50, [True] * 50, [-1.0] * 50, [CALL], "eos", 0)
        asked: list[object] = []

        class Counting(pickle.Pickler):
            def persistent_id(self, value: object) -> None:
                asked.append(value)

        Counting(io.BytesIO()).dump(trajectories_to_state([trajectory] * count))
        return len(asked)

    assert objects(20) == objects(1)


def test_a_tree_is_one_line_of_json_with_prompts_once():
    line = json.dumps(tree_to_dict(make_tree("a\nb\u2028c")))
    assert "\n" not in line
    state = json.loads(line)
    assert (state["task"], state["references"], state["prompt_ids"]) == ("t", ["7"], ids_of("t?"))
    assert [root["reward"] for root in state["roots"]] == [1.0, 0.0, None]
    (branch,) = state["branches"]
    assert (branch["root"], branch["position"], branch["prefix_length"]) == (0, 3, 4)
    assert (branch["score"], branch["entropy_z"], branch["future_value_z"]) == (1.25, 0.5, 2.5)
    assert branch["tool_calls"][0]["argument"] == "the city"
    assert not any("prompt_ids" in entry for entry in (*state["roots"], branch))


# --- text ------------------------------------------------------------------------------------------------------------


def test_a_tree_as_text_shows_question_roots_and_where_a_branch_left():
    text = render_tree(make_tree(), scripted_tokenizer(), max_roots=1)
    assert text.splitlines() == [
        "task t   answer: 7",
        "  t?",
        "",
        "root 0   reward 1.00   19 tokens   1 tool call",
        "  │ <think>hm</think>",
        "  │ <answer>7</answer>",
        "  ├─ branch after token 4   score 1.25   reward 0.25   14 tokens   1 tool call",
        "  │    …<think>h⎇on the other hand",
        "",
        "(2 more roots)",
    ]


def test_what_was_not_scored_is_said():
    text = render_tree(make_tree(), scripted_tokenizer(), max_roots=3)
    assert "root 2   not scored" in text
    assert "more root" not in text


def test_the_turns_of_any_tool_start_on_a_line_of_their_own():
    tree = make_tree("<think>hm</think><browse>x</browse><result>y</result><answer>7</answer>")
    tree.roots[0].tool_calls[0].name = "browse"
    lines = [line.strip("│ ") for line in render_tree(tree, scripted_tokenizer()).splitlines()]
    for line in ("<think>hm</think>", "<browse>x</browse>", "<result>y</result>", "<answer>7</answer>"):
        assert line in lines


FUNCTION_CALLS = (
    "<think>\nhm\n</think>\n\n"
    '<tool_call>\n{"name": "search", "arguments": {"query": "a\\nb"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "search"}\n</tool_call>'
    "\nuser\n<tool_response>\nfirst\nsecond\n</tool_response>\n<tool_response>\nmalformed\n</tool_response>"
    "\nassistant\nso\n<tool_call>\nnever closed"
)


def test_function_calls_and_their_results_read_as_a_dialogue():
    tree = make_tree(FUNCTION_CALLS)
    lines = [line.removeprefix("  │ ") for line in render_tree(tree, scripted_tokenizer(), max_roots=1).splitlines()]
    assert lines[4:-5] == [
        "<think>",
        "hm",
        "</think>",
        '<tool_call>{"name": "search", "arguments": {"query": "a\\nb"}}</tool_call>',
        '<tool_call>{"name": "search"}</tool_call>',
        "<tool_response>first",
        "second</tool_response>",
        "<tool_response>malformed</tool_response>",
        "so",
        "<tool_call>",
        "never closed",
    ]


@pytest.mark.parametrize("odd", ["", " \n\n", "\x00\x1b[31m\x07\r\n", "```\n# x\n```", "\u202e\u2028\ufffd", "é\ud800"])
def test_odd_text_neither_crashes_nor_garbles(odd):
    tree = make_tree()
    tree.task.references = (odd,)
    for trajectory in tree.roots:
        trajectory.response_text = odd
    text = render_tree(tree, scripted_tokenizer(), max_roots=3)
    assert not any(ord(letter) < 32 and letter not in "\n\t" for letter in text)
    assert not any(line.startswith("`") for line in text.splitlines())  # would end a Markdown block
    text.encode("utf-8")
