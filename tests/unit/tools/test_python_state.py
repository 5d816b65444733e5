"""The digest of a session's variables, by which a branch is compared with its root."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from appo_lightning.errors import ToolFailure
from appo_lightning.rollout.sessions import EpisodeSession, digest_of
from appo_lightning.tools._sandbox.state import digest
from appo_lightning.types import Task, ToolCall

TASK = Task("task", [1], ("answer",))


def recorded(session, code: str) -> ToolCall:
    """A call of a root."""
    try:
        answer, error = session.call(code), None
    except ToolFailure as failure:
        answer, error = failure, "error"
    call = ToolCall("python", code, str(answer), 0, 0, succeeded=error is None, seconds=0.0, error=error)
    call.digest = digest_of(answer, session.state_digest)
    return call


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (1, True),
        (1, 1.0),
        ("1", 1),
        (0.1, 0.2),
        (1 << 5000, (1 << 5000) + 1),
        (-3, 3),
        ("a", "b"),
        ("ab", "a"),
        (b"a", "a"),
        ([1, 2], [2, 1]),
        ([1], (1,)),
        ([[1], 2], [[1, 2]]),
        ({"a": 1}, {"a": 2}),
        ({1, 2}, {1, 3}),
        (np.array([1.0, 2.0]), np.array([1.0, 2.5])),
        (np.zeros(4), np.zeros((2, 2))),
        (np.float32(1), np.float64(1)),
        (object(), 1),
    ],
)
def test_what_differs_has_another_digest(one, other):
    assert digest({"x": one}) != digest({"x": other})
    assert digest({"x": one}) == digest({"x": one, "__name__": "what is not the policy's"})
    assert len(digest({"x": one})) == 16


def test_names_count_and_the_order_of_sets_and_of_names_does_not():
    assert digest({"x": 1}) != digest({"y": 1})
    assert digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1})
    one, other = {0, 8}, {8, 0}  # both want the same place
    assert list(one) != list(other)
    assert digest({"x": one}) == digest({"x": other})


def test_objects_count_by_their_type_and_run_no_code():
    class Loud:
        def __init__(self, value: int) -> None:
            self.value = value

        def __repr__(self) -> str:
            raise AssertionError("run")

        __hash__ = __eq__ = __getattribute__ = __repr__  # type: ignore[assignment]

    assert digest({"x": object.__new__(Loud)}) == digest({"x": object.__new__(Loud)}) != ""


def test_a_container_in_itself_and_a_huge_one_come_to_an_end():
    endless: list[object] = [1]
    endless.append(endless)
    assert len(digest({"x": endless})) == 16
    many = list(range(1_000_000))
    assert digest({"x": many}) != digest({"x": many[:-1]})
    assert digest({"x": "a" * 10_000_000}) != digest({"x": "a" * 9_999_999})


def test_what_cannot_be_read_has_none():
    assert digest({1: 2}) == ""  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("code", "matches"),
    [
        ("x = 1; words = {'a', 'b'}; import math; f = lambda: 1", True),
        ("import random; x = random.random()", True),  # from the same seed
        ("import time; x = time.time()", False),
        ("import os; x = [os.urandom(8)]", False),
        ("x = id(object()) + __import__('time').perf_counter_ns()", False),
        ("import uuid; x = {'id': uuid.uuid4().hex}", False),
        ("import time; x = time.time(); 1 / 0", False),  # fails in the same way, but leaves something else behind
    ],
)
def test_a_branch_that_holds_something_else_is_marked_though_nothing_was_printed(tool, code, matches):
    session = tool.open(TASK)
    call = recorded(session, code)
    session.close()
    branch = EpisodeSession(tool, TASK, [call])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        branch.call("1")
    branch.close()
    assert branch.state_matches is matches
    assert len(said) == (not matches)


def test_a_call_that_worked_in_the_root_and_fails_in_a_branch_is_marked(tool):
    root = ToolCall("python", "1 / 0", "0", 0, 0, succeeded=True, seconds=0.0, digest=digest_of("0"))
    branch = EpisodeSession(tool, TASK, [root])
    with pytest.warns(UserWarning, match="did not do what it did in its root"), pytest.raises(ToolFailure):
        branch.call("1")
    branch.close()
    assert branch.state_matches is False
