"""Two processes do what one does: the same rollouts, the same step, the same files."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from appo_lightning.callbacks import EvaluationReport, GracefulStop, RolloutStatistics
from appo_lightning.module import LossOptions
from appo_lightning.policy.causal_lm import full_tensor
from appo_lightning.policy.options import OptimizerOptions
from appo_lightning.policy.snapshot import PolicySnapshot
from appo_lightning.rollout.tree import BranchingOptions
from appo_lightning.samplers.base import Completion
from appo_lightning.samplers.transformers import TransformersSampler
from helpers.ranks import assert_raises_on_every_rank, kill_oneself, run_ranks, run_until_killed
from helpers.training import BatchRecorder, Result, Run, fit, make_checkpoint, result_of

pytestmark = [pytest.mark.distributed]
STRATEGIES = ("ddp", "fsdp2")
# AdamW turns rounding into a step where a gradient is nearly 0: a small one stays within CLOSE.
SMALL_STEPS = OptimizerOptions(learning_rate=3e-4)
PREVIOUS = BranchingOptions(2, 4, gain_baseline="previous")
# Sums in another order, through two steps of AdamW.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("policy"), hidden_size=32, num_layers=1)


@pytest.fixture(scope="module")
def one_process() -> Callable[[Run], Result]:
    """The run on one process; each is made once."""
    made: dict[str, Result] = {}

    def make(run: Run) -> Result:
        run = changed(run, strategy="auto")
        if repr(run) not in made:
            made[repr(run)] = fit(run)
        return made[repr(run)]

    return make


@pytest.fixture(scope="module")
def two_ranks() -> Callable[[Run], list[Result]]:
    """The run on two ranks without a break; each is made once."""
    made: dict[str, list[Result]] = {}

    def make(run: Run) -> list[Result]:
        if repr(run) not in made:
            made[repr(run)] = run_ranks(fit, run)
        return made[repr(run)]

    return make


def changed(run: Run, **changes: Any) -> Run:
    return Run(**vars(run) | changes)


def token_ids(tree: dict[str, Any]) -> list[list[int]]:
    return [trajectory["response_ids"] for trajectory in [*tree["roots"], *tree["branches"]]]


def assert_same_training(ranks: list[Result], one: Result) -> None:
    """Every rollout to the token; metrics and weights up to the order of sums."""
    for step, expected in one.rollouts.items():
        tasks = [set(rank.rollouts[step]) for rank in ranks]
        assert not tasks[0] & tasks[1]
        together = ranks[0].rollouts[step] | ranks[1].rollouts[step]
        assert {task: token_ids(tree) for task, tree in together.items()} == {
            task: token_ids(tree) for task, tree in expected.items()
        }, f"step {step}"
    for step, metrics in one.metrics.items():
        for name, value in metrics.items():
            if name.startswith(("loss/", "rollout/", "branch/", "credit/", "tools/calls", "policy/", "val/")):
                assert ranks[0].metrics[step][name] == pytest.approx(value, rel=1e-3, abs=1e-5), (step, name)
    for name, weight in one.weights.items():
        np.testing.assert_allclose(ranks[0].weights[name], weight, atol=CLOSE, rtol=0, err_msg=name)
    assert_equal_weights(ranks[0], ranks[1])


def assert_equal_weights(one: Result, other: Result) -> None:
    for name, weight in one.weights.items():
        assert (other.weights[name] == weight).all(), name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_like_one_process(checkpoint, one_process, strategy, lora) -> None:
    # Branches are rows too: about every step the ranks have different numbers of micro-batches.
    run = Run(checkpoint, max_steps=2, lora=lora, train_branches=True, micro_batch_tokens=160, strategy=strategy)
    run.optimizer = SMALL_STEPS
    ranks = run_ranks(fit, run)
    one = one_process(run)
    assert_same_training(ranks, one)
    untrained = AutoModelForCausalLM.from_pretrained(checkpoint)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert abs(one.weights[name] - untrained.get_parameter(name).detach().numpy()).max() > 50 * CLOSE


class GradientRecorder(L.Callback):
    """Keeps the whole gradient that the optimiser saw."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradient = {name: full_tensor(p.grad).numpy().copy() for name, p in pl_module.policy.trainable()}


def first_gradient(run: Run) -> tuple[dict[str, Any], list[float]]:
    """Of the first step, and its loss, which rank 0 knows."""
    recorder = GradientRecorder()
    result = fit(run, [recorder])
    return recorder.gradient, result.series("loss/policy")


@pytest.mark.parametrize(("strategy", "shared_prefixes"), [("ddp", False), ("fsdp2", True)])
def test_the_gradient_of_all_micro_batches_and_ranks_is_that_of_one_big_batch(
    checkpoint, strategy, shared_prefixes
) -> None:
    one_batch = Run(checkpoint, max_steps=1, train_branches=True, micro_batch_tokens=10**6)
    one_batch.optimizer = OptimizerOptions(max_grad_norm=None)
    whole, loss = first_gradient(one_batch)
    assert loss
    cut = changed(one_batch, micro_batch_tokens=160, strategy=strategy, shared_prefixes=shared_prefixes)
    ranks = run_ranks(first_gradient, cut)
    assert ranks[0][1] == pytest.approx(loss, abs=1e-6)
    for gradient, _ in ranks:
        assert gradient.keys() == whole.keys()
        for name, expected in whole.items():
            np.testing.assert_allclose(gradient[name], expected, atol=1e-6, rtol=0, err_msg=name)
    assert max(abs(gradient).max() for gradient in whole.values()) > 1e-2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shared_prefixes_work_on_two_ranks(checkpoint, one_process, strategy) -> None:
    # Prompts differ in what their rows share: so do the ranks in their numbers of forward passes.
    run = Run(checkpoint, max_steps=2, train_branches=True, micro_batch_tokens=160, score_batch_tokens=160)
    run.optimizer, run.strategy, run.shared_prefixes = SMALL_STEPS, strategy, True
    assert_same_training(run_ranks(fit, run), one_process(run))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reference_previous_policy_and_phases_work_on_two_ranks(checkpoint, one_process, strategy) -> None:
    run = Run(
        checkpoint,
        max_steps=3,
        prompts_per_phase=4,
        branching=PREVIOUS if strategy == "ddp" else replace(PREVIOUS, sampled_per="phase"),
        lora=True,
        optimizer=SMALL_STEPS,
        # Below 1: it binds on every token, whatever rounding makes of the ratio.
        loss=LossOptions(kl="k3", kl_coefficient=0.1, importance_cap=0.9),
        strategy=strategy,
    )
    assert_same_training(run_ranks(fit, run), one_process(run))


class UnequalMicroBatches(L.Callback):
    """Rank 0 cuts its rows one by one, rank 1 not at all."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.micro_batch_tokens = 1 if trainer.global_rank == 0 else 10**6


def fit_unequal(run: Run) -> Result:
    return fit(run, [UnequalMicroBatches()])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unequal_numbers_of_micro_batches_neither_hang_nor_count_twice(
    checkpoint, one_process, tmp_path: Path, strategy, tied
) -> None:
    if not tied:
        checkpoint = untie(checkpoint, tmp_path)
    run = Run(checkpoint, max_steps=2, strategy=strategy, optimizer=SMALL_STEPS)
    assert_same_training(run_ranks(fit_unequal, run), one_process(run))


def untie(checkpoint: str, directory: Path) -> str:
    """The same policy with a head of its own."""
    tied = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = tied.config
    weights = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    config.tie_word_embeddings = False
    model = Qwen3ForCausalLM(config)
    model.load_state_dict(weights)
    model.generation_config = tied.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(directory)
    return str(directory)


# --- resume ------------------------------------------------------------------------------------------------------


class KilledSampler(TransformersSampler):
    """Rank 1 dies while it samples branches of the step after the given one."""

    def __init__(self, after_steps: int) -> None:
        super().__init__()
        self.after_steps, self.pushes = after_steps, 0

    def load_weights(self, weights: Any) -> None:
        super().load_weights(weights)
        self.pushes += 1

    def step(self) -> list[Completion]:
        completions = super().step()
        if self.pushes > self.after_steps and torch.distributed.get_rank() == 1:
            kill_oneself()
        return completions


def fit_and_die(run: Run, after_steps: int) -> None:
    fit(run, sampler=KilledSampler(after_steps))


@pytest.mark.parametrize(("strategy", "lora", "steps"), [("ddp", False, 1), ("fsdp2", False, 1), ("fsdp2", True, 2)])
def test_two_killed_ranks_continue_exactly(checkpoint, two_ranks, tmp_path: Path, strategy, lora, steps) -> None:
    run = Run(checkpoint, lora=lora, max_steps=3, branching=PREVIOUS, strategy=strategy)
    whole = two_ranks(run)
    broken = changed(run, output=str(tmp_path))
    run_until_killed(fit_and_die, broken, steps, world_size=2)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == steps

    resumed = run_ranks(fit, changed(broken, resume=str(tmp_path / "last.ckpt")))
    for rank in range(2):
        assert resumed[rank].rollouts == {step: whole[rank].rollouts[step] for step in range(steps, 3)}
        assert_equal_weights(resumed[rank], whole[rank])
    for step, metrics in resumed[0].metrics.items():
        for name in ("loss/policy", "loss/grad_norm", "rollout/reward", "branch/score"):
            assert metrics.get(name) == whole[0].metrics[step].get(name), (step, name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_moves_between_one_process_and_two_between_phases_only(
    checkpoint, one_process, tmp_path: Path, strategy
) -> None:
    last = str(tmp_path / "last.ckpt")
    two = Run(checkpoint, str(tmp_path), max_steps=1, prompts_per_phase=4, lora=True, strategy=strategy)
    run_ranks(fit, two)
    fit(changed(two, strategy="auto", resume=last, max_steps=2))
    ranks = run_ranks(fit, changed(two, resume=last, max_steps=3))
    expected = one_process(Run(checkpoint, max_steps=3, prompts_per_phase=4, lora=True))
    for name, weight in expected.weights.items():
        np.testing.assert_allclose(ranks[0].weights[name], weight, atol=CLOSE, rtol=0)

    if strategy == "fsdp2":
        return
    fit(Run(checkpoint, str(tmp_path), max_steps=1, lora=True))  # the first of a phase of two
    message = "inside a rollout phase of 1 processes, this run has 2; resume with 1"
    assert_raises_on_every_rank(message, fit, changed(two, resume=last, prompts_per_phase=8))


class SignalRankOne(L.Callback):
    """The signal reaches one rank only, or all."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.global_rank in self.ranks:
            os.kill(os.getpid(), signal.SIGTERM)


def fit_signalled(run: Run, ranks: tuple[int, ...]) -> tuple[int | None, int]:
    stop = GracefulStop()
    result = fit(run, [SignalRankOne(ranks), stop])
    return stop.received, result.global_step


@pytest.mark.parametrize("signalled", [(1,), (0, 1)])
def test_ranks_agree_on_a_stop(checkpoint, tmp_path: Path, signalled) -> None:
    run = Run(checkpoint, str(tmp_path), strategy="ddp")
    assert run_ranks(fit_signalled, run, signalled) == [(15, 1), (15, 1)]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


# --- weights -----------------------------------------------------------------------------------------------------


def collect_weights(run: Run, directory: str) -> dict[str, Any]:
    """Everything that gathers weights, after one step."""
    module, data, recorder = run.module(), run.data(), BatchRecorder()
    trainer = run.make_trainer([recorder])
    trainer.fit(module, datamodule=data)
    before = result_of(trainer, module, recorder)
    # A forward pass without gradient leaves the root's parameters gathered.
    roots = [root for group in data.source.phase.roots for root in group]  # type: ignore[union-attr]
    module.score(roots, temperature=1.0)
    snapshot = PolicySnapshot(module.policy)
    whole = snapshot.state_dict()
    shards = sum(tensor.numel() for tensor in snapshot._saved.values())
    with torch.no_grad():
        for _, parameter in module.policy.trainable():
            parameter.add_(1.0)
    snapshot.load_state_dict(whole)
    with snapshot.active():
        restored = result_of(trainer, module, recorder)
    with torch.no_grad():
        for _, parameter in module.policy.trainable():
            parameter.sub_(1.0)
    module.score(roots, temperature=1.0)
    after = result_of(trainer, module, recorder)
    module.export(directory)
    if run.lora:
        module.export(directory + "_adapters", merge=False)
    return {
        "before": before,
        "restored": restored,
        "after": after,
        "snapshot": {name: tensor.numpy() for name, tensor in whole.items()},
        "shards": shards,
    }


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gathered_weights_snapshots_and_exports_are_whole(checkpoint, one_process, tmp_path, strategy, lora) -> None:
    run = Run(checkpoint, max_steps=1, lora=lora, strategy=strategy)
    parts = run_ranks(collect_weights, run, str(tmp_path / "export"))
    one = one_process(run)
    for part in parts:
        for name, weight in one.weights.items():
            np.testing.assert_allclose(part["before"].weights[name], weight, atol=CLOSE, rtol=0)
        assert_equal_weights(part["restored"], part["before"])
        for name, weight in part["before"].weights.items():  # + 1 - 1 rounds
            np.testing.assert_allclose(part["after"].weights[name], weight, atol=1e-6, rtol=0)
    total = sum(tensor.size for tensor in parts[0]["snapshot"].values())
    shards = [part["shards"] for part in parts]
    assert shards == [total, total] if strategy == "ddp" else sum(shards) == total

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    for name, parameter in exported.named_parameters():
        np.testing.assert_allclose(parameter.detach(), parts[0]["before"].weights[name], atol=1e-6, rtol=0)
    if lora:
        base = AutoModelForCausalLM.from_pretrained(checkpoint)
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "export_adapters"))
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            torch.testing.assert_close(adapted(ids).logits, exported(ids).logits, atol=1e-5, rtol=0)


class DeafOnRankOne(TransformersSampler):
    def load_weights(self, weights: Any) -> None:
        if torch.distributed.get_rank() == 1:
            for _ in weights:
                pass
        else:
            super().load_weights(weights)


def fit_deaf(run: Run) -> None:
    fit(run, sampler=DeafOnRankOne())


class PoisonRankOne(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1:
            batch.advantages[0] = float("nan")


def fit_poisoned(run: Run) -> None:
    fit(run, [PoisonRankOne()])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_error_on_one_rank_is_an_error_on_all(checkpoint, tmp_path: Path, strategy) -> None:
    run = Run(checkpoint, strategy=strategy)
    assert_raises_on_every_rank("rank 1: after a weight push the sampler holds other numbers", fit_deaf, run)
    run.trainer = {"default_root_dir": str(tmp_path)}
    assert_raises_on_every_rank("at step 0; the rollouts of this step are in", fit_poisoned, run)
    names = {f"failed_step_0_rank_{rank}.jsonl" for rank in range(2)}
    assert names <= {path.name for path in tmp_path.iterdir()}


# --- evaluation --------------------------------------------------------------------------------------------------


def evaluate(run: Run, directory: str) -> tuple[dict[str, float], int]:
    """Train a step, with reports and TensorBoard; validate; predict."""
    module, data = run.module(), run.data()
    trainer = run.make_trainer(
        [EvaluationReport(), RolloutStatistics(text_every=1)],
        logger=TensorBoardLogger(directory, name="", version=""),
        limit_val_batches=1.0,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.validate(module, data, verbose=False)
    batches: Any = trainer.predict(module, data)
    data.close()
    return metrics, sum(len(batch.trees) for batch in batches)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validation_metrics_are_means_over_the_tasks_of_all_ranks(checkpoint, tmp_path: Path, strategy) -> None:
    run = Run(checkpoint, max_steps=1, strategy=strategy, validation_size=5)
    ranks = run_ranks(evaluate, run, str(tmp_path / "two"))
    one, tasks = evaluate(changed(run, strategy="auto"), str(tmp_path / "one"))
    assert [count for _, count in ranks] == [3, 2]
    assert tasks == 5
    for metrics, _ in ranks:
        assert set(metrics) == set(one)
        assert {n: v for n, v in metrics.items() if n != "val/seconds"} == pytest.approx(
            {n: v for n, v in one.items() if n != "val/seconds"}, rel=1e-6
        )
    assert {path.name for path in (tmp_path / "two").iterdir()} >= {
        "validation.json",
        "validation_rollouts.txt",
        "rollout_sample.txt",
    }


def build_with(strategy: Any, run: Run) -> None:
    trainer = run.make_trainer(strategy=strategy)
    trainer.fit(run.module(), datamodule=run.data())


def test_options_that_do_not_fit_two_ranks_are_refused(checkpoint) -> None:
    run = Run(checkpoint, strategy="ddp", prompts_per_mini_batch=1)
    assert_raises_on_every_rank("must be a multiple of the 2 processes, got 1", fit, run)


@pytest.mark.parametrize(
    ("sizes", "lora", "message"),
    [((1, 2), False, "set tensor_parallel_size: 1"), ((2, 1), True, "set save_distributed_checkpoint: false")],
)
def test_a_mesh_or_file_that_would_go_wrong_is_refused(checkpoint, sizes, lora, message) -> None:
    assert_raises_on_every_rank(message, build_fsdp2, Run(checkpoint, strategy="fsdp2", lora=lora), sizes)


def build_fsdp2(run: Run, sizes: tuple[int, int]) -> None:
    build_with(ModelParallelStrategy(*sizes, process_group_backend="gloo"), run)


def fit_sharded_files(run: Run) -> Result:
    module, data, recorder = run.module(), run.data(), BatchRecorder()
    trainer = run.make_trainer([recorder], strategy=ModelParallelStrategy(2, 1, process_group_backend="gloo"))
    trainer.fit(module, datamodule=data, ckpt_path=run.resume, weights_only=True)
    return result_of(trainer, module, recorder)


def test_a_checkpoint_in_shards_continues_exactly_too(checkpoint, two_ranks, tmp_path: Path) -> None:
    run = Run(checkpoint, max_steps=3, branching=PREVIOUS, strategy="fsdp2")
    whole = two_ranks(run)
    run_ranks(fit_sharded_files, changed(run, output=str(tmp_path), max_steps=1))
    assert (tmp_path / "last.ckpt").is_dir()
    resumed = run_ranks(fit_sharded_files, changed(run, resume=str(tmp_path / "last.ckpt")))
    for rank in range(2):
        assert resumed[rank].rollouts == {step: whole[rank].rollouts[step] for step in (1, 2)}
        assert_equal_weights(resumed[rank], whole[rank])


def fit_vllm(run: Run) -> Result:
    from appo_lightning.samplers.vllm import VLLMSampler

    return fit(run, sampler=VLLMSampler(kv_cache_mb=64))


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_every_rank_has_an_engine_of_its_own_with_the_trainers_weights(checkpoint) -> None:
    run = Run(checkpoint, max_steps=3, prompts_per_phase=4, lora=True, strategy="ddp")
    ranks = run_ranks(fit_vllm, run, timeout=240.0)
    gaps = ranks[0].series("sync/canary_gap")
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    assert max(ranks[0].series("sync/logprob_gap_max")) < 1e-3
    assert ranks[0].series("rollout/cached_token_share")[0] > 0  # branches continue what the engine has seen
    assert_equal_weights(ranks[0], ranks[1])
    for step in range(3):
        assert not set(ranks[0].rollouts[step]) & set(ranks[1].rollouts[step])
        assert all(set(rank.branch_versions[step]) <= {step} for rank in ranks)
