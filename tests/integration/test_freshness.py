"""What is sampled comes from the weights that it should come from."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from appo_lightning.errors import ConfigurationError, EngineFailure, WeightSyncError
from appo_lightning.rollout.tree import BranchingOptions
from appo_lightning.samplers.base import Completion, SampleRequest
from appo_lightning.samplers.transformers import TransformersSampler
from appo_lightning.tasks.lookup import LookupTasks
from helpers.training import Run, fit, make_checkpoint

GRPO = BranchingOptions(4, 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("policy"), hidden_size=32, num_layers=1)


class Chronicle(TransformersSampler):
    """Writes down, in order: pushes, sampling with a digest of the weights; steps are added by ``Steps``."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, Any]] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        super().load_weights(weights)
        self.events.append(("push", self.digest()))

    def step(self) -> list[Completion]:
        if self.num_unfinished:
            self.events.append(("sample", self.digest()))
        return super().step()

    def digest(self) -> float:
        assert self._model is not None
        return digest(self._model)


def digest(model: torch.nn.Module) -> float:
    """A number that changes with any weight."""
    with torch.no_grad():
        return float(sum(parameter.double().square().sum() for parameter in model.parameters()))


class Steps(L.Callback):
    """Adds the trainer's steps to the chronicle, with the weights after them."""

    def __init__(self, sampler: Chronicle) -> None:
        self.sampler = sampler

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.sampler.events.append(("step", digest(pl_module.policy)))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.sampler.events.append(("step", digest(pl_module.policy)))


def chronicle(run: Run) -> tuple[Chronicle, Any]:
    sampler = Chronicle()
    return sampler, fit(run, [Steps(sampler)], sampler)


def test_batch_k_plus_1_is_sampled_with_the_weights_of_step_k(checkpoint) -> None:
    run = Run(checkpoint, max_steps=4, prompts_per_phase=4, branching=GRPO)
    sampler, result = chronicle(run)
    assert result.versions == {step: [step] * 16 for step in range(4)}
    events = [(kind, value) for kind, value in sampler.events if kind != "push"]
    trainer_weights = None
    sampled_after_step = []
    for kind, value in events:
        if kind == "step":
            trainer_weights = value
            sampled_after_step.append(0)
        else:
            assert value == pytest.approx(trainer_weights, rel=1e-12)
            sampled_after_step[-1] += 1
    # Start, four steps; nothing is sampled in advance of the last step's successor.
    assert [bool(count) for count in sampled_after_step] == [True, True, True, True, False]
    digests = [value for kind, value in sampler.events if kind == "push"]
    assert len(set(digests)) == len(digests) == 4


def test_roots_of_a_phase_share_one_version_and_branches_have_the_current_one(checkpoint) -> None:
    run = Run(checkpoint, max_steps=8, epochs_per_phase=2, train_branches=True)
    sampler, result = chronicle(run)
    for step in range(8):
        phase_began = 4 * (step // 4)
        assert result.versions[step][:8] == [phase_began] * 8
        assert result.branch_versions[step]
        assert set(result.branch_versions[step]) == {step}
    # A push before every step: roots of the phase or branches of the mini-batch.
    assert sum(kind == "push" for kind, _ in sampler.events) == 8


def test_without_branches_the_sampler_is_synced_once_a_phase(checkpoint) -> None:
    sampler, result = chronicle(Run(checkpoint, max_steps=4, branching=GRPO))
    assert sum(kind == "push" for kind, _ in sampler.events) == 2
    assert result.versions == {0: [0] * 16, 1: [0] * 16, 2: [2] * 16, 3: [2] * 16}


@pytest.mark.parametrize("lora", [False, True])
def test_validation_samples_with_the_current_weights_and_disturbs_nothing(checkpoint, lora) -> None:
    run = Run(checkpoint, max_steps=4, lora=lora)
    plain = fit(run)
    validated = Run(checkpoint, max_steps=4, lora=lora)
    validated.trainer = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    sampler, result = chronicle(validated)
    assert result.rollouts == plain.rollouts
    assert result.series("loss/policy") == plain.series("loss/policy")
    assert all((result.weights[name] == weight).all() for name, weight in plain.weights.items())
    assert len(result.series("val/reward")) == 4
    assert sum(kind == "push" for kind, _ in sampler.events) == 5


def test_validate_then_fit_equals_fit(checkpoint) -> None:
    plain = fit(Run(checkpoint, max_steps=2))
    run = Run(checkpoint, max_steps=2, trainer={"limit_val_batches": 1.0, "check_val_every_n_epoch": 100})
    module, data = run.module(), run.data()
    trainer = run.make_trainer()
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.validate(module, data, verbose=False)
    assert before["val/tasks"] == after["val/tasks"] == 5
    assert before["val/reward"] != after["val/reward"]
    for name, weight in module.policy.named_weights():
        assert (weight.detach().numpy() == plain.weights[name]).all()
    data.close()


class Deaf(TransformersSampler):
    """Says that it takes weights in, and keeps its own."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for _ in weights:
            pass


class Mumbling(TransformersSampler):
    """Returns log-probs that are not numbers."""

    def step(self) -> list[Completion]:
        done = super().step()
        for completion in done:
            completion.logprobs = [float("nan")] * len(completion.logprobs)
        return done


class Secretive(Deaf):
    """Nor does it let anyone look at them."""

    def read_weights(self, columns: Mapping[str, Sequence[int]]) -> dict[str, list[Tensor]]:
        return {}


class Hanging(TransformersSampler):
    """Does not come back from the canary's step, or comes back empty-handed again and again."""

    def __init__(self, comes_back: bool) -> None:
        super().__init__()
        self.comes_back = comes_back

    def step(self) -> list[Completion]:
        time.sleep(0.01 if self.comes_back else 60)
        return []


class Remembering(TransformersSampler):
    """Serves a token of every request from a cache, that of the first push too."""

    def step(self) -> list[Completion]:
        done = super().step()
        for completion in done:
            completion.cached_tokens = 1
        return done


@pytest.mark.parametrize("lora", [False, True])
def test_weights_that_stayed_the_old_ones_are_read_back(checkpoint, lora) -> None:
    run = Run(checkpoint, lora=lora)
    run.optimizer.learning_rate = 1e-6  # far too little for the log-probs to tell
    with pytest.raises(
        WeightSyncError, match=r"holds other numbers than the trainer in [1-9]\d* of 13 weights, model\."
    ):
        fit(run, sampler=Deaf())


@pytest.mark.parametrize("lora", [False, True])
def test_the_canary_notices_a_sampler_that_ignores_weights(checkpoint, lora) -> None:
    said = r"after a weight push .* differ from the trainer's by .* nats on average \(limit 0.001\)"
    with pytest.raises(WeightSyncError, match=said):
        fit(Run(checkpoint, lora=lora), sampler=Secretive())


def test_the_roots_notice_a_sampler_that_ignores_weights(checkpoint) -> None:
    run = Run(checkpoint, branching=GRPO, sync={"read_columns": 0, "canary_prompts": 0})
    with pytest.raises(WeightSyncError, match=r"on the roots of this phase .* by .* nats on average \(limit 0.001\)"):
        fit(run, sampler=Secretive())


def test_adapters_as_they_are_need_adapters_and_a_sampler_that_computes_with_them(checkpoint) -> None:
    with pytest.raises(ConfigurationError, match=r"sync.lora: adapter has no effect .*: set model.policy.lora"):
        fit(Run(checkpoint, sync={"lora": "adapter"}))
    with pytest.raises(ConfigurationError, match="TransformersSampler does not: use merge"):
        fit(Run(checkpoint, lora=True, sync={"lora": "adapter"}))


class Sleepy(Chronicle):
    """Forgets its weights in its sleep."""

    asleep = False

    def wake(self) -> bool:
        self.events.append(("wake", self.asleep))
        kept, self.asleep = not self.asleep, False
        return kept

    def sleep(self) -> None:
        self.events.append(("sleep", None))
        self.asleep = True


def test_the_sampler_sleeps_while_the_trainer_learns(checkpoint) -> None:
    sampler = Sleepy()
    fit(Run(checkpoint, max_steps=4, branching=GRPO), [Steps(sampler)], sampler)
    order = [kind for kind, _ in sampler.events]
    once = [kind for kind, previous in zip(order, [None, *order], strict=False) if kind != previous]
    # Two phases of two mini-batches: nothing is sampled for the second.
    assert once == ["step", *2 * ["wake", "push", "sample", "sleep", "step", "sleep", "step"]]


def test_a_sampler_that_slept_through_validation_gets_its_weights_again(checkpoint) -> None:
    sampler = Sleepy()
    run = Run(checkpoint, max_steps=1, branching=GRPO)
    run.trainer = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    fit(run, [Steps(sampler)], sampler)
    order = [kind for kind, _ in sampler.events]
    assert order.count("push") == order.count("wake") == order.count("sleep") == 2
    assert order[-1] == "sleep"


def test_the_canary_notices_nan(checkpoint) -> None:
    with pytest.raises(WeightSyncError, match="by nan nats"):
        fit(Run(checkpoint), sampler=Mumbling())


@pytest.mark.parametrize("comes_back", [False, True])
def test_an_engine_that_hangs_in_the_canary_is_given_up(checkpoint, tmp_path, comes_back) -> None:
    run, sampler = Run(checkpoint, output=str(tmp_path)), Hanging(comes_back)
    data = run.data(sampler)
    data.rollout = replace(data.rollout, stall_timeout_s=0.5)
    with pytest.raises(EngineFailure, match=r"sampled no token for 0.5 seconds \(data.rollout.stall_timeout_s\)"):
        run.make_trainer().fit(run.module(), datamodule=data)
    assert sampler.num_unfinished == 0


def test_the_canary_notices_what_a_sampler_says_of_its_cache(checkpoint) -> None:
    with pytest.raises(WeightSyncError, match="still serves 1 tokens, which belong to the old weights"):
        fit(Run(checkpoint), sampler=Remembering())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_new_engine_is_asked_whole_prompts_and_later_the_end_of_one_in_turn(checkpoint, precision) -> None:
    """In half precision, where a token alone says little, always all of them."""
    asked: list[list[int]] = []

    class Listening(TransformersSampler):
        def submit(self, request: SampleRequest) -> None:
            if request.max_tokens == 1:
                asked.append(request.token_ids)
            super().submit(request)

    run = Run(checkpoint, max_steps=4, prompts_per_phase=4, branching=GRPO, trainer={"precision": precision})
    fit(run, sampler=Listening())
    first, second = asked[:2]
    if precision == "bf16-mixed":
        assert asked == 4 * [first, second]
        return
    assert [len(prompt) for prompt in asked] == [33, 33, 2, 2, 2]
    assert asked[2:] == [second[-2:], first[-2:], second[-2:]]


def test_the_canary_needs_no_validation_questions(checkpoint) -> None:
    class NoTasks(LookupTasks):
        def __len__(self) -> int:
            return 0

    run = Run(checkpoint, max_steps=1)
    trainer, data = run.make_trainer(), run.data()
    data.validation = NoTasks()
    trainer.fit(run.module(), datamodule=data)
    assert any("sync/canary_gap" in step for step in trainer.logger.steps.values())


def test_the_canary_can_be_turned_off(checkpoint) -> None:
    asked: list[SampleRequest] = []

    class Listening(Deaf):
        def submit(self, request: SampleRequest) -> None:
            asked.append(request)
            super().submit(request)

    run = Run(checkpoint, max_steps=1, branching=GRPO)
    run.sync = {"canary_prompts": 0}
    fit(run, sampler=Listening())
    assert all(request.max_tokens > 8 for request in asked[:32])
