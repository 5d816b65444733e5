"""Claims about who gets a slot of the engine."""

from __future__ import annotations

import pytest

from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
from appo_lightning.rollout.slots import SlotQueue
from helpers.scripted import EchoTool, ScriptedSampler, after, make_task, scripted_tokenizer
from helpers.tiny import EOS


def popped(queue: SlotQueue, *, generating: int = 0) -> list[int]:
    order = []
    while (trajectory := queue.pop(generating + len(order))) is not None:
        order.append(trajectory)
    return order


def test_no_more_than_the_slots():
    queue = SlotQueue(num_slots=3, cache_tokens=None)
    for trajectory in range(5):
        queue.push(trajectory, turn=1, tokens=10)
    assert popped(queue, generating=1) == [0, 1]
    assert len(queue) == 3
    assert popped(queue, generating=3) == []


def test_fewest_turns_go_first_then_the_order_of_the_trajectories():
    queue = SlotQueue(num_slots=None, cache_tokens=None)
    for trajectory, turn in ((4, 2), (0, 3), (7, 1), (2, 2), (6, 1)):
        queue.push(trajectory, turn=turn, tokens=10)
    assert popped(queue) == [6, 7, 2, 4, 0]


def test_those_that_have_begun_go_first_once_the_cache_is_full():
    queue = SlotQueue(num_slots=None, cache_tokens=100)
    queue.push(0, turn=1, tokens=60)
    assert popped(queue) == [0]
    queue.push(0, turn=2, tokens=70)  # 70 of 100 held from here on
    queue.push(1, turn=1, tokens=60)
    queue.push(2, turn=1, tokens=60)
    # 60 + 60 > 100: the cache has no room for a second one. Yet no slot stays empty.
    assert popped(queue) == [0, 1, 2]


def test_a_trajectory_that_has_ended_makes_room():
    queue = SlotQueue(num_slots=None, cache_tokens=100)
    queue.push(0, turn=1, tokens=60)
    queue.push(1, turn=1, tokens=40)
    assert popped(queue) == [0, 1]
    queue.push(1, turn=2, tokens=50)
    queue.push(2, turn=1, tokens=50)
    queue.finish(0)
    assert popped(queue) == [2, 1]  # 40 + 50 <= 100


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_slots_do_not_change_what_is_sampled(slots):
    script = after({"?": "<search>a</search>", "]</result>": f"<answer>7</answer>{EOS}"})

    def roll(sampler: ScriptedSampler):
        loop = RolloutLoop(sampler, [EchoTool()], scripted_tokenizer(), RolloutLimits())
        prefixes = [Prefix(make_task(f"t{i}"), seed=i) for i in range(6)]
        return [trajectory.response_ids for trajectory in loop.run(prefixes, policy_version=0)]

    # ScriptedSampler refuses a request beyond its slots.
    sampler = ScriptedSampler(script, steps=lambda request: 1 + request.id % 3, slots=slots)
    assert roll(sampler) == roll(ScriptedSampler(script))
    assert len(sampler.requests) == 12
    assert [request.id for request in sampler.requests[:6]] == list(range(6))  # all begin before one goes on
