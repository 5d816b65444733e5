"""RolloutDataModule: tasks become roots, branches and mini-batches, fresh for every optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol, cast

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.module import AppoModule
from appo_lightning.rewards.base import Reward
from appo_lightning.rollout.formats.base import CallFormat, CallSyntax
from appo_lightning.rollout.formats.tags import TagFormat
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
from appo_lightning.rollout.phase import LogprobGap
from appo_lightning.rollout.prompts import build_task
from appo_lightning.rollout.tree import BranchingOptions
from appo_lightning.samplers.base import Sampler
from appo_lightning.sources import EvaluationSource, RolloutSource
from appo_lightning.tasks.base import TaskSource
from appo_lightning.tools.base import Tool
from appo_lightning.tools.recording import on_record
from appo_lightning.types import Task


class PushWeights(Protocol):
    """Gives the sampler the current weights, if it has others, and proves that they arrived."""

    def __call__(self, *, alone: bool = False) -> None:
        """Collective unless ``alone``: then only this process's sampler has other weights."""


class RolloutDataModule(L.LightningDataModule):
    """Samples, branches and scores rollouts.

    Args:
        train: questions to train on.
        validation: held-out questions.
        sampler: rollout engine.
        tools: tools that the agent may call.
        record_tools: file that keeps what the tools answer, and answers what it already holds.
        replay_tools: such a file; all calls are answered from it, and no tool is touched.
        call_format: how it writes calls; null is ``TagFormat``, the paper's tags.
        reward: scores a finished response.
        rollout: budgets and sampling of one trajectory.
        branching: rollouts per prompt and where they branch.
        prompts_per_phase: P, prompts sampled with the same weights, over all processes.
        prompts_per_mini_batch: prompts of one optimiser step, over all processes; divides P.
        epochs_per_phase: passes over the roots of a phase; every pass branches anew.
        train_branches: add the branches' own tokens to the loss, with their group advantage.
        validation_rollouts: rollouts per validation question; success is their mean.
        validation_temperature: null samples as in training; 0 is greedy.
        seed: of task order and sampling.
    """

    def __init__(
        self,
        train: TaskSource,
        validation: TaskSource,
        sampler: Sampler,
        reward: Reward,
        tools: list[Tool] = [],  # noqa: B006  # jsonargparse shows it; never mutated
        record_tools: str | None = None,
        replay_tools: str | None = None,
        call_format: CallFormat | None = None,
        rollout: RolloutLimits = RolloutLimits(),  # noqa: B008  # likewise
        branching: BranchingOptions = BranchingOptions(),  # noqa: B008  # likewise
        prompts_per_phase: int = 128,
        prompts_per_mini_batch: int = 16,
        epochs_per_phase: int = 1,
        train_branches: bool = False,
        validation_rollouts: int = 1,
        validation_temperature: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("prompts_per_phase", prompts_per_phase),
            ("prompts_per_mini_batch", prompts_per_mini_batch),
            ("epochs_per_phase", epochs_per_phase),
            ("validation_rollouts", validation_rollouts),
        ):
            if value < 1:
                raise ConfigurationError(f"data.{name} must be at least 1, got {value}")
        if prompts_per_phase % prompts_per_mini_batch:
            raise ConfigurationError(
                f"data.prompts_per_phase must be a multiple of data.prompts_per_mini_batch, "
                f"got {prompts_per_phase} and {prompts_per_mini_batch}"
            )
        if (branching.num_branches or train_branches) and not sampler.provides_logprobs:
            raise ConfigurationError(
                f"data.branching asks for {branching.num_branches} branches per prompt, but {type(sampler).__name__} "
                "gives no log-probs; use a sampler that does, or num_rollouts = num_roots"
            )
        if branching.num_branches and branching.min_remaining >= rollout.max_response_tokens:
            raise ConfigurationError(
                f"data.branching.min_remaining = {branching.min_remaining} leaves no place to branch in responses of "
                f"data.rollout.max_response_tokens = {rollout.max_response_tokens}; lower it"
            )
        if train_branches and not branching.num_branches:
            raise ConfigurationError("data.train_branches has no effect without branches; raise num_rollouts")
        if len(train) < prompts_per_phase:
            raise DataError(
                f"data.train has {len(train)} tasks, one phase needs {prompts_per_phase}; "
                "lower data.prompts_per_phase or add tasks"
            )
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"data.tools: the names of tools must differ, got {', '.join(names)}")
        self.call_format = call_format or TagFormat()
        if reward.call_format not in (None, self.call_format.name):
            raise ConfigurationError(
                f"data.reward reads calls in the format {reward.call_format!r}, the policy writes "
                f"{self.call_format.name!r}: set data.reward.init_args.call_format: {self.call_format.name}"
            )
        self.train, self.validation = train, validation
        self.sampler, self.reward = sampler, reward
        self.tools = on_record(tools, record=record_tools, replay=replay_tools)
        self.rollout, self.branching = rollout, branching
        self.prompts_per_phase, self.prompts_per_mini_batch = prompts_per_phase, prompts_per_mini_batch
        self.epochs_per_phase, self.train_branches = epochs_per_phase, train_branches
        self.validation_rollouts = validation_rollouts
        self.validation_limits = replace(rollout, patience_s=None)  # what it measures must not depend on the clock
        if validation_temperature is not None:
            self.validation_limits = replace(self.validation_limits, temperature=validation_temperature)
        self.seed = seed
        # Set by SamplerWeightSync.
        self.push_weights: PushWeights | None = None
        self.check_gap: Callable[[LogprobGap], None] | None = None
        self.source: RolloutSource | None = None
        self.engines = 0  # started so far
        self._started = False
        self._syntax: CallSyntax | None = None

    # --- Lightning -------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Any:
        self.source = RolloutSource(self)
        return self.source

    def val_dataloader(self) -> Any:
        return EvaluationSource(self)

    def test_dataloader(self) -> Any:
        return EvaluationSource(self)

    def predict_dataloader(self) -> Any:
        return EvaluationSource(self)

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        world_size = self.trainer.world_size
        if stage == "fit" and self.prompts_per_mini_batch % world_size:
            raise ConfigurationError(
                f"data.prompts_per_mini_batch must be a multiple of the {world_size} processes, "
                f"got {self.prompts_per_mini_batch}"
            )
        if stage == "fit":
            self._check_sampling()

    def _check_sampling(self) -> None:
        limits = self.rollout
        if limits.temperature == 0 or limits.top_p != 1 or limits.top_k != 0 or limits.min_p != 0:
            raise ConfigurationError(
                "training needs samples of the policy itself: data.rollout.temperature > 0, top_p = 1, top_k = 0, "
                f"min_p = 0, got {limits.temperature:g}, {limits.top_p:g}, {limits.top_k}, {limits.min_p:g}"
            )

    def close(self) -> None:
        """Release sampler and tools. Safe to call twice."""
        self.sampler.close()
        self._started = False
        for tool in self.tools:
            tool.close()

    # --- the pieces ------------------------------------------------------------------------------------------------

    @property
    def module(self) -> AppoModule:
        """The bare module, also under DDP."""
        assert self.trainer is not None
        return cast(AppoModule, self.trainer.lightning_module)

    def start_sampler(self) -> None:
        """Start the engine once; late, so that the process group exists before it."""
        if self._started:
            return
        _ = self.syntax  # a template that cannot be used should not cost the start of an engine
        limits = self.rollout
        max_length = limits.max_prompt_tokens + limits.max_response_tokens
        policy = self.module.policy
        if max_length > policy.max_positions:
            raise ConfigurationError(
                f"data.rollout: max_prompt_tokens + max_response_tokens = {max_length} exceeds the "
                f"{policy.max_positions} positions of {policy.options.path}"
            )
        self.sampler.start(policy.options.path, policy.tokenizer, max_length=max_length)
        self._started = True
        self.engines += 1

    def sync_sampler(self, *, alone: bool = False) -> None:
        """Wake the sampler and give it the current weights, if it has others; prove that they arrived.

        Args:
            alone: only this process takes part; for weights that are not sharded.
        """
        if self.push_weights is None:
            raise ConfigurationError(
                "nothing pushes weights to the sampler: add appo_lightning.callbacks.SamplerWeightSync "
                "to trainer.callbacks"
            )
        self.start_sampler()
        self.push_weights(alone=alone)

    def restart_sampler(self) -> None:
        """A fresh engine with the current weights, on this process alone."""
        self.sampler.close()
        self._started = False
        self.sync_sampler(alone=True)

    def loop(self, limits: RolloutLimits) -> RolloutLoop:
        """A rollout loop under some limits."""
        assert self.trainer is not None
        # Sharded weights are gathered by all processes together: one alone cannot start afresh.
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        restart = None if sharded and self.trainer.world_size > 1 else self.restart_sampler
        return RolloutLoop(self.sampler, self.tools, self.module.policy.tokenizer, limits, restart, self.syntax)

    @property
    def syntax(self) -> CallSyntax:
        """The call format, for the policy's tokenizer; checked when it is first asked for."""
        if self._syntax is None:
            for tool in self.tools:
                tool.prepare()
            self._syntax = self.call_format.bind(self.module.policy.tokenizer, self.tools)
        return self._syntax

    def tasks(self, source: TaskSource, indices: Iterable[int]) -> list[Task]:
        """Tokenised tasks."""
        # All are drawn before the first is tokenised: the two in turns would push each other out of the core's caches.
        rows = [source.row(index) for index in indices]
        tokenizer, tools = self.module.policy.tokenizer, self.syntax.prompt_tools
        longest = self.rollout.max_prompt_tokens
        return [build_task(row, tokenizer, max_prompt_tokens=longest, tools=tools) for row in rows]

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell a progress bar that knows about rollouts."""
        assert self.trainer is not None
        bar = self.trainer.progress_bar_callback
        if bar is not None and hasattr(bar, "rollout"):
            bar.rollout(stage, done, total)
