"""A workload whose tokens and tool calls are fixed in advance, and a sampler that keeps to it: for bench_rollout.py."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from appo_lightning.rollout.formats.tags import ResultEncoder
from appo_lightning.samplers.base import Completion, Sampler, SampleRequest
from appo_lightning.samplers.vllm import VLLMSampler
from appo_lightning.tools.base import StatelessTool
from appo_lightning.types import Task

PROMPT_TOKENS = 40
RESULT = "ok then go on"


@dataclass
class Workload:
    """What each sequence does: tokens of each turn, and seconds of the call after each turn but the last."""

    turns: list[list[int]]
    seconds: list[list[float]]

    @property
    def tokens(self) -> int:
        """Generated tokens of all sequences."""
        return sum(map(sum, self.turns))


def workload(
    sequences: int,
    turns: int,
    *,
    tools: tuple[float, float] | None,
    length: tuple[int, int] = (32, 96),
    slow_every: int = 0,
    vary: bool = False,
    draw: int = 0,
) -> Workload:
    """A draw of turns and calls.

    Args:
        sequences: how many.
        turns: of each sequence, or their mean.
        tools: shortest and longest call in seconds; None: calls that return at once.
        length: fewest and most tokens of a turn.
        slow_every: one call in so many takes 3 s.
        vary: sequences differ in their number of turns, 1 to 2 * turns - 1, as those of an agent do.
        draw: number of the draw.
    """
    random_state = random.Random(draw)
    counts = [random_state.randint(1, 2 * turns - 1) if vary else turns for _ in range(sequences)]
    tokens = [[random_state.randint(*length) for _ in range(count)] for count in counts]
    seconds = [[random_state.uniform(*tools) if tools else 0.0 for _ in range(count - 1)] for count in counts]
    calls = [(row, turn) for row, count in enumerate(counts) for turn in range(count - 1)]
    if slow_every:
        # Spread over turns as a random draw would be: lock-step meets one in most rounds.
        for row, turn in random_state.sample(calls, max(1, len(calls) // slow_every)):
            seconds[row][turn] = 3.0
    return Workload(tokens, seconds)


class WaitTool(StatelessTool):
    """Takes as long as the workload says."""

    name, timeout_s = "wait", 30.0

    def __init__(self) -> None:
        self.workload = Workload([], [])

    def run(self, argument: str, task: Task) -> str:
        """``argument`` is "row turn"."""
        row, turn = map(int, argument.split())
        if self.workload.seconds[row][turn]:
            time.sleep(self.workload.seconds[row][turn])
        return RESULT


class FixedTurns(Sampler):
    """The engine, with the number of tokens of each turn fixed and a call written over the end of it.

    A turn is found by the length of the request, so that branches fit in as well.
    """

    def __init__(self, inner: VLLMSampler, tokenizer: Any) -> None:
        self.inner, self.tokenizer = inner, tokenizer
        self.tool = WaitTool()
        self.result_ids, _ = ResultEncoder(tokenizer, [self.tool.name]).encode(RESULT, 1024)
        self.rows: list[int] = []  # row of the workload, by request id
        self._wanted: dict[int, tuple[int, int, int, int]] = {}
        self._calls: dict[tuple[int, int], list[int]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self.seconds_in_engine = self.seconds_with_work = 0.0
        self.first_cached: dict[int, tuple[int, int]] = {}  # cached tokens and tokens of a sequence's first request
        self._busy_since: float | None = None

    def set_workload(self, work: Workload, rows: Sequence[int] | None = None) -> None:
        """What the requests to come will do."""
        self.tool.workload, self.rows = work, list(range(len(work.turns)) if rows is None else rows)
        for row, turns in enumerate(work.turns):  # not while the clock runs
            for turn in range(len(turns)):
                self.call_ids(row, turn)
        self.reset()

    def turn_of(self, row: int, length: int) -> tuple[int, int]:
        """The turn that a response of ``length`` tokens is in, and the tokens that it lacks."""
        stop = 0
        for turn, tokens in enumerate(self.tool.workload.turns[row]):
            stop += tokens
            if length < stop:
                return turn, stop - length
            stop += len(self.result_ids)
        raise AssertionError("the sequence is over")

    def call_ids(self, row: int, turn: int) -> list[int]:
        """The call that ends a turn; none after the last."""
        if turn == len(self.tool.workload.turns[row]) - 1:
            return []
        if (row, turn) not in self._calls:
            self._calls[row, turn] = self.tokenizer.encode(f"<wait>{row} {turn}</wait>", add_special_tokens=False)
        return self._calls[row, turn]

    def submit(self, request: SampleRequest) -> None:
        """Queue the rest of the turn."""
        row = self.rows[request.id]
        turn, tokens = self.turn_of(row, len(request.token_ids) - PROMPT_TOKENS)
        self._wanted[request.id] = (row, turn, tokens, len(request.token_ids))
        if self._busy_since is None:
            self._busy_since = time.perf_counter()
        self.inner.submit(replace(request, max_tokens=tokens))

    def step(self) -> list[Completion]:
        """One step of the engine."""
        began = time.perf_counter()
        completions = self.inner.step()
        ended = time.perf_counter()
        self.seconds_in_engine += ended - began
        if not self.inner.num_unfinished and self._busy_since is not None:
            self.seconds_with_work += ended - self._busy_since
            self._busy_since = None
        return [self._with_call(completion) for completion in completions]

    def _with_call(self, completion: Completion) -> Completion:
        row, turn, tokens, length = self._wanted.pop(completion.id)
        assert len(completion.token_ids) == tokens, "the policy ended a turn by itself"
        self.first_cached.setdefault(completion.id, (completion.cached_tokens, length))
        call = self.call_ids(row, turn)
        ids = [*completion.token_ids[: tokens - len(call)], *call]
        return replace(completion, token_ids=ids, finish="stop" if call else "eos")

    @property
    def num_slots(self) -> int:
        """Of the engine."""
        return self.inner.num_slots

    @property
    def cache_tokens(self) -> int | None:
        """Of the engine."""
        return self.inner.cache_tokens

    @property
    def num_unfinished(self) -> int:
        """Of the engine."""
        return self.inner.num_unfinished

    @property
    def idle_share(self) -> float:
        """Time in which the engine had requests and did not run, over the time in which it had requests."""
        return 1 - self.seconds_in_engine / self.seconds_with_work

    def start(self, checkpoint: str, tokenizer: Any, *, max_length: int) -> None:
        """Started already."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Nothing moves here."""

    def abort(self, ids: Sequence[int]) -> None:
        """Hand on."""
        self.inner.abort(ids)
