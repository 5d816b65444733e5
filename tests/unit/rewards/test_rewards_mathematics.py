import copy
import multiprocessing
import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from appo_lightning.errors import ConfigurationError
from appo_lightning.rewards import MathReward
from appo_lightning.rewards.equivalence import EquivalenceChecker
from appo_lightning.types import Task


@pytest.fixture(scope="module")
def reward():
    return MathReward()


def boxed(answer):
    return f"<think>a</think><answer>\\boxed{{{answer}}}</answer>"


def score(reward, answer, *references):
    return reward.score(Task(id="t", prompt_ids=[], references=references), boxed(answer))


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("12", "12.0"),
        ("\\frac{1}{2}", "0.5"),
        ("$\\frac{1}{2}$", "1/2"),
        ("x^2 - 1", "(x-1)(x+1)"),
        ("4", "x = 4"),
        ("\\{1, 2\\}", "\\{2, 1\\}"),
        ("1,000", "1000"),
    ],
)
def test_notation_does_not_matter(reward, reference, answer):
    found = score(reward, answer, reference)
    assert (found.value, found.success) == (1.0, True)
    assert found.parts == {"accuracy": 1.0, "format": 1.0, "tool_bonus": 0.0}


@pytest.mark.parametrize(
    "answer",
    ["13", "", " ", "\x00", "\udc80", "\\frac{", "5\n6", "\\frac{1}{0}", "12" * 501, "\\text{no idea}", "[] null"],
    ids=repr,
)
def test_anything_else_is_wrong_but_never_an_error(reward, answer):
    assert not score(reward, answer, "12").success


def test_any_reference_may_match(reward):
    assert score(reward, "0.25", "7", "\\frac{1}{4}").success


def test_the_tagged_rule_applies(reward):
    task = Task(id="t", prompt_ids=[], references=("2",))
    tools = "<search>q</search><result>r</result><python>1+1</python><result>2</result>"
    assert reward.score(task, "2").value == -1.0
    assert reward.score(task, boxed("2").replace("<answer>", f"{tools}<answer>")).value == pytest.approx(1.1)


@pytest.mark.parametrize("answer", ["9^{9^{9}}", "9^{9^{9^9}}", "100000000!", "(" * 900])
def test_an_endless_comparison_is_a_wrong_answer_in_bounded_time(answer):
    reward = MathReward(timeout_seconds=0.5)
    start = time.monotonic()
    assert not score(reward, answer, "5").success
    assert time.monotonic() - start < 60.0
    # The next answer is graded by a fresh worker.
    assert score(reward, "5.0", "5").success


def test_threads_share_one_reward(reward):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: score(reward, f"{n}.0", "7").success, range(16)))
    assert found == [n == 7 for n in range(16)]


def test_a_copy_has_a_worker_of_its_own(reward):
    score(reward, "1.0", "1")
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert score(twin, "0.5", "1/2").success
        assert twin._checker._worker is not reward._checker._worker


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_share_the_worker(reward):
    assert score(reward, "1.0", "1").success
    child = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(0 if score(reward, "0.5", "1/2").success else 1)
    )
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert score(reward, "0.25", "1/4").success


def test_a_worker_killed_between_answers_costs_no_verdict():
    checker = EquivalenceChecker()
    assert checker.equivalent("1/2", "0.5")
    os.kill(checker._worker.pid, signal.SIGKILL)
    checker._worker.wait()
    assert checker.equivalent("1/2", "0.5")


def test_the_worker_ends_with_its_checker():
    checker = EquivalenceChecker()
    checker.equivalent("1/2", "0.5")
    worker = checker._worker
    del checker
    assert worker.returncode is not None


def test_a_worker_that_cannot_start_is_an_error_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the math-verify worker must start, got exit status 1"):
        EquivalenceChecker().equivalent("1/2", "0.5")


def test_wrong_options_are_refused_in_one_line():
    with pytest.raises(ConfigurationError, match="timeout_seconds must be > 0, got 0"):
        MathReward(timeout_seconds=0)
    with pytest.raises(ConfigurationError, match="max_answer_characters must be >= 1, got 0"):
        MathReward(max_answer_characters=0)
