import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.rewards import AnswerReward
from appo_lightning.rewards.tagged import last_boxed, read_tagged_response
from appo_lightning.types import Task

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "appo_reference_vectors.json").read_text())["answer_reward"]
TOOLS = ("search", "python")
SEARCH = "<search>q</search><result>r</result>"
PYTHON = "<python>1</python><result>1</result>"


def task(*references):
    return Task(id="t", prompt_ids=[], references=references)


def answered(box, before="<think>a</think>"):
    return f"{before}<answer>so {box}</answer>"


@pytest.mark.parametrize("case", VECTORS, ids=range(len(VECTORS)))
def test_the_published_scores(case):
    truth = case["ground_truth"]
    score = AnswerReward().score(task(*([truth] if isinstance(truth, str) else truth)), case["response"])
    assert score.value == pytest.approx(case["score"])
    assert score.parts["f1"] == pytest.approx(case["f1"])
    assert score.success == (case["f1"] == 1.0)
    assert score.parts["format"] == float(case["score"] != -1)
    bonus = case["score"] - case["f1"] if case["score"] != -1 else 0.0
    assert score.parts["tool_bonus"] == pytest.approx(bonus)


def test_the_bonus_wants_every_tool_and_a_right_word():
    reward = AnswerReward()
    both = f"<think>a</think>{SEARCH}<think>b</think>{PYTHON}"
    assert reward.score(task("Paris"), answered(r"\boxed{Paris}", both)).value == pytest.approx(1.1)
    assert reward.score(task("Rome"), answered(r"\boxed{Paris}", both)).value == 0.0
    assert reward.score(task("Paris"), answered(r"\boxed{Paris}", f"<think>a</think>{SEARCH}")).value == 1.0


def test_every_option_has_its_effect():
    searched = answered(r"\boxed{Paris France}", f"<think>a</think>{SEARCH}")
    # F1 of "paris france" and "paris": 2/3
    plain = AnswerReward().score(task("Paris"), searched)
    assert (plain.value, plain.success) == (pytest.approx(2 / 3), False)
    lenient = AnswerReward(tool_bonus=0.5, bonus_tools=("search",), success_threshold=0.6)
    score = lenient.score(task("Paris"), searched)
    assert (score.value, score.success) == (pytest.approx(2 / 3 + 0.5), True)
    assert AnswerReward(format_penalty=-0.25).score(task("Paris"), "Paris").value == -0.25
    lookup = answered(r"\boxed{x}", "<think>a</think><lookup>q</lookup>")
    assert AnswerReward().score(task("x"), lookup).value == 1.0
    assert AnswerReward(bonus_tools=("lookup",), tools=("lookup",)).score(task("x"), lookup).value == -1.0


@pytest.mark.parametrize(
    ("text", "violation"),
    [
        ("", "0 <think> and 0 </think>"),
        ("<think>a<answer>\\boxed{1}</answer>", "1 <think> and 0 </think>"),
        ("<think>a</think>", "not exactly one <answer>"),
        ("<think>a</think><answer>\\boxed{1}", "not exactly one <answer>"),
        ("<think>a</think></answer>\\boxed{1}<answer>", "no \\boxed{...} inside <answer>...</answer>"),
        ("<think>a \\boxed{1}</think><answer>1</answer>", "no \\boxed{...} inside <answer>...</answer>"),
        ("<think>a</think><answer>\\boxed{1</answer>}", "no \\boxed{...} inside <answer>...</answer>"),
        ("<think>a</think><search>q<answer>\\boxed{1}</answer>", "<search> is never closed"),
        ("<think>a</think><search>q</search><result>r", "<search> has no complete <result>"),
        (f"<think>a</think><search>q</search>{PYTHON}", "<search> has no complete <result>"),
        ("<think>a</think><result>r</result><search>q</search>", "<search> has no complete <result>"),
    ],
)
def test_the_first_rule_broken_is_named(text, violation):
    assert read_tagged_response(text, TOOLS).violation == violation


def test_tags_inside_a_tool_result_are_not_the_policys():
    page = "<search>q</search><result>a page with <answer>, <think> and <python> in it</result>"
    response = read_tagged_response(answered(r"\boxed{1}", f"<think>a</think>{page}"), TOOLS)
    assert response.violation is None
    assert (response.answer, response.tools_used) == ("1", {"search"})


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a\\}", "a\\\\"),
        (r"\boxed{}", ""),
        (r"\boxed{1", None),
        (r"\boxed{{1}", None),
        ("\\boxed{1\\", None),
        ("boxed{1}", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        answered("\\boxed{\x00}"),
        answered("\\boxed{\ud800}"),
        answered("\\boxed{" * 9),
        "<search>" * 9,
        "</think>",
    ],
    ids=repr,
)
def test_hostile_text_earns_at_most_nothing(text):
    assert AnswerReward().score(task("Paris"), text).value <= 0.0


@given(
    st.lists(
        st.sampled_from(
            [f"<{slash}{tag}>" for slash in ("", "/") for tag in ("think", "search", "python", "result", "answer")]
            + ["\\boxed{", "{", "}", "\\", "Paris", "\n"]
        ),
        max_size=40,
    )
)
def test_no_arrangement_of_tags_raises(pieces):
    score = AnswerReward().score(task("Paris"), "".join(pieces))
    assert -1.0 <= score.value <= 1.1


@pytest.mark.parametrize(
    "text",
    ["<search>" * 300_000, "<search></search>" * 100_000, SEARCH * 60_000, answered("\\boxed{" + "{" * 2_000_000)],
    ids=["open calls", "calls without results", "calls", "braces"],
)
def test_huge_text_is_scored_in_linear_time(text):
    start = time.process_time()
    assert AnswerReward().score(task("Paris"), text).value == -1.0
    assert time.process_time() - start < 5.0


def test_a_task_without_reference_is_a_data_error():
    with pytest.raises(DataError, match="task t must have a reference answer, got none"):
        AnswerReward().score(task(), answered(r"\boxed{1}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format_penalty": 1.0}, "format_penalty must be <= 0, got 1.0"),
        ({"tool_bonus": -0.1}, "tool_bonus must be >= 0, got -0.1"),
        ({"bonus_tools": ()}, "tool_bonus has no effect without bonus_tools"),
        ({"bonus_tools": ("mcp",)}, "bonus_tools must be among tools"),
        ({"success_threshold": 0.0}, "success_threshold must be in"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, message):
    with pytest.raises(ConfigurationError, match=message):
        AnswerReward(**options)


# --- JSON function calls ---------------------------------------------------------------------------------------------

CALL = '<tool_call>\n{"name": "%s", "arguments": {"query": "%s"}}\n</tool_call>'
# As the response reads without its special tokens.
RESPONSES = "\nuser\n<tool_response>\nr\n</tool_response>{}\nassistant\n"
ONE_RESPONSE = RESPONSES.format("")
TWO_RESPONSES = RESPONSES.format("\n<tool_response>\nr\n</tool_response>")
HERMES_REWARD = AnswerReward(call_format="hermes")


def hermes_value(before: str) -> float:
    return HERMES_REWARD.score(task("Paris"), answered(r"\boxed{Paris}", before)).value


def test_answered_function_calls_are_well_formed_and_earn_the_bonus():
    search = f"<think>a</think>{CALL % ('search', 'q')}{ONE_RESPONSE}"
    assert hermes_value(search) == 1.0
    assert hermes_value(f"{search}<think>b</think>{CALL % ('python', '1')}{ONE_RESPONSE}") == pytest.approx(1.1)
    both = f"<think>a</think>{CALL % ('search', 'q')}\n{CALL % ('python', '1')}{TWO_RESPONSES}"
    assert hermes_value(both) == pytest.approx(1.1)


def test_function_calls_without_as_many_responses_break_the_format():
    assert hermes_value(f"<think>a</think>{CALL % ('search', 'q')}") == -1.0
    two = f"{CALL % ('search', 'q')}{CALL % ('search', 'r')}"
    assert hermes_value(f"<think>a</think>{two}{ONE_RESPONSE}") == -1.0
    assert hermes_value(f"<think>a</think>{two}{TWO_RESPONSES}") == 1.0
    assert hermes_value(f"<think>a</think>{two}\nuser\n<tool_response>\nr") == -1.0


def test_tags_inside_calls_and_responses_are_not_the_policys():
    call = CALL % ("python", "print('<answer></answer><think>')")
    assert hermes_value(f"<think>a</think>{call}{ONE_RESPONSE.replace(chr(10) + 'r', '<answer>')}") == 1.0


def test_a_malformed_call_that_was_answered_is_no_use_of_a_tool():
    response = read_tagged_response(
        f"<think>a</think><tool_call>search</tool_call>{ONE_RESPONSE}" + answered(r"\boxed{x}", ""), TOOLS, "hermes"
    )
    assert (response.violation, response.tools_used, response.answer) == (None, set(), "x")


@given(
    st.lists(st.sampled_from([CALL % ("search", "q"), ONE_RESPONSE, "<tool_call>", "</tool_response>", "<think>", "x"]))
)
def test_no_function_call_text_stops_the_reward(pieces):
    assert HERMES_REWARD.score(task("x"), "".join(pieces)).value <= 1.1


@pytest.mark.parametrize("piece", ["<tool_response>", "<tool_call>", "</tool_response>"])
def test_long_nonsense_is_scored_in_linear_time(piece):
    started = time.monotonic()
    HERMES_REWARD.score(task("x"), piece * 20_000)
    assert time.monotonic() - started < 2.0
