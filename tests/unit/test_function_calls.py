"""Claims about reading JSON function calls: nothing that a policy writes can stop it, what is wrong is told."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_lightning.function_calls import FunctionCall, read_calls, without_thoughts

FORM = 'expected one JSON object {"name": ..., "arguments": {...}}'


def written(name: str, arguments: dict, *, space: str = "\n") -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>{space}{call}{space}</tool_call>"


def test_every_call_is_read_in_order():
    text = f"let me see {written('search', {'query': 'a'})} and\n{written('python', {'code': '1'}, space='')}"
    assert read_calls(text) == [FunctionCall("search", {"query": "a"}), FunctionCall("python", {"code": "1"})]


def test_text_without_calls_has_none():
    assert read_calls("the answer is 7 </answer> <search>a</search>") == []


def test_a_closing_tag_inside_a_string_is_part_of_the_string():
    arguments = {"code": 'print("</tool_call><tool_call>")'}
    assert read_calls(written("python", arguments)) == [FunctionCall("python", arguments)]


@pytest.mark.parametrize(
    ("inside", "problem"),
    [
        ("", "Expecting value at its end; " + FORM),
        ("search for a", "Expecting value at character 0 ('search for a'); " + FORM),
        ('{"name": "search"', "Expecting ',' delimiter at its end; " + FORM),
        ("{'name': 'search'}", "Expecting property name enclosed in double quotes at character 1"),
        ('{"name": "a\nb"}', "Invalid control character at character 11"),
        ("[1]", "a list; " + FORM),
        ("null", "null; " + FORM),
        ("true", "a truth value; " + FORM),
        ("7", "a number; " + FORM),
        ("{}", "no name; " + FORM),
        ('{"name": 7, "arguments": {}}', "name is a number; " + FORM),
        ('{"name": "search"}', "no arguments; " + FORM),
        ('{"name": "search", "arguments": "{}"}', "arguments is a string; " + FORM),
        ('{"name": "a", "arguments": {}} {"name"', "'{\"name\"' behind the JSON; "),
        ("[" * 100_000, "RecursionError in its JSON; " + FORM),
        ('{"name": ' + "9" * 10_000 + "}", "ValueError in its JSON; " + FORM),
    ],
)
def test_what_is_wrong_with_a_call_is_told(inside, problem):
    good = written("search", {"query": "b"})
    malformed, following = read_calls(f"<tool_call>{inside}</tool_call>{good}")
    assert malformed.arguments is None
    assert malformed.problem.startswith(problem)
    assert "tool_call>" not in malformed.problem
    assert following == FunctionCall("search", {"query": "b"})


def test_a_call_without_its_closing_tag_is_malformed_and_the_next_is_read():
    good = written("search", {"query": "b"})
    first, second = read_calls('<tool_call>{"name": "search", "arguments": {}} ' + good)
    assert first.problem.startswith("no closing tag; ")
    assert second == FunctionCall("search", {"query": "b"})
    (only,) = read_calls('<tool_call>{"name": "search", "arguments": {}}')
    assert only.problem.startswith("no closing tag; ")


def test_a_closing_tag_without_its_opening_tag_is_malformed():
    (call,) = read_calls('{"name": "search", "arguments": {}}</tool_call>')
    assert call.problem.startswith("a closing tag without an opening tag; ")


def test_the_name_of_a_malformed_call_is_kept_where_it_can_be_read():
    assert read_calls('<tool_call>{"name": "search"}</tool_call>')[0].name == "search"


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("<think>a</think>b", "b"),
        ("a<think>b</think>c<think>d</think>e", "ace"),
        ("opened in the prompt</think>b", "b"),
        ("opened</think>b<think>c</think>d", "bd"),
        ("never closed <think>b", "never closed <think>b"),
        ("no thought", "no thought"),
    ],
)
def test_thoughts_are_left_out(text, spoken):
    assert without_thoughts(text) == spoken


def test_a_call_inside_a_thought_is_none():
    call = written("search", {"query": "a"})
    assert read_calls(f"<think>maybe {call}?</think>no") == []
    assert len(read_calls(f"<think>maybe {call}?</think>{call}")) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.tuples(st.text(), st.dictionaries(st.text(), json_values, max_size=3)), max_size=3))
def test_calls_come_back_as_they_were_written(calls):
    # A thought inside a string cannot be told from one around it.
    text = " and ".join(written(name, arguments) for name, arguments in calls)
    if "</think>" not in text:
        assert read_calls(text) == [FunctionCall(name, arguments) for name, arguments in calls]


pieces = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        '{"name": "a"',
        ', "arguments": {}}',
        "[",
        "{",
        '"',
        "7",
        "\n",
    ]
)


@given(st.lists(pieces | st.text(max_size=4), max_size=20).map("".join))
def test_no_text_can_stop_the_reader(text):
    for call in read_calls(text):
        assert (call.arguments is None) == bool(call.problem)


@pytest.mark.parametrize(
    "piece", ["<tool_call>", "</tool_call>", "<think>", '<tool_call>{"', "<think></think>", "[", "\n"]
)
def test_long_nonsense_is_read_in_linear_time(piece):
    started = time.thread_time()
    read_calls(piece * 20_000)
    assert time.thread_time() - started < 2.0
