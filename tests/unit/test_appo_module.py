"""AppoModule: the gradient is that of the loss on paper, however it is cut up; nothing wrong passes silently."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch import Tensor

from appo_lightning.batching import PaddedSequences, ProcedureBatch
from appo_lightning.errors import ConfigurationError, NonFiniteLossError
from appo_lightning.module import AppoModule, LossOptions
from appo_lightning.policy.options import OptimizerOptions
from appo_lightning.policy.snapshot import PolicySnapshot
from appo_lightning.rewards.base import Score
from appo_lightning.rollout.tree import BranchingOptions
from appo_lightning.types import Task
from helpers.tiny import perturb
from helpers.training import LetterReward, RecordingLogger, Run, make_checkpoint

KL = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: torch.exp(-d) - 1 + d}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("policy"), hidden_size=32, num_layers=1)


def weights_of(module: AppoModule) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.policy.trainable()}


class GradientCatcher(L.Callback):
    """Keeps the batch, the weights before the step and the gradient that the optimiser saw (before clipping: off)."""

    def __init__(self) -> None:
        self.batches: list[ProcedureBatch] = []
        self.before: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: ProcedureBatch, batch_idx: int) -> None:
        self.batches.append(batch)
        self.before.append(weights_of(pl_module))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.policy.trainable()})


NO_CLIPPING = OptimizerOptions(learning_rate=3e-3, max_grad_norm=None)


def train(run: Run) -> tuple[GradientCatcher, AppoModule, RecordingLogger]:
    catcher, module, data = GradientCatcher(), run.module(), run.data()
    trainer = run.make_trainer([catcher])
    trainer.fit(module, datamodule=data)
    data.close()
    assert isinstance(trainer.logger, RecordingLogger)
    return catcher, module, trainer.logger


def logprobs_of(module: AppoModule, weights: dict[str, Tensor], batch: ProcedureBatch) -> Tensor:
    """Log-probs [B, L] with some weights, by whole-vocabulary log_softmax."""
    with torch.no_grad():
        for name, parameter in module.policy.trainable():
            parameter.copy_(weights[name])
    ids, lengths = batch.sequences.token_ids, batch.sequences.lengths
    attention = torch.arange(ids.shape[1])[None] < lengths[:, None]
    logits = module.policy.model(input_ids=ids, attention_mask=attention).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(chosen, (1, 0)) * batch.mask


def paper_loss(logprobs: Tensor, batch: ProcedureBatch, options: LossOptions, reference: Tensor | None) -> Tensor:
    """Token by token, as in the paper; the dual clip binds nowhere in these batches."""
    assert batch.advantages is not None
    total: Any = 0.0
    for row, t in batch.mask.nonzero().tolist():
        ratio = torch.exp(logprobs[row, t] - batch.old_logprobs[row, t])
        advantage = batch.advantages[row, t]
        clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
        term = -torch.minimum(ratio * advantage, clipped * advantage)
        if options.importance_cap is not None:
            weight = float((batch.old_logprobs[row, t] - batch.behaviour_logprobs[row, t]).exp())
            if (
                options.importance_mode == "mask"
                and not (options.importance_floor or 0) <= weight <= options.importance_cap
            ):
                weight = 0.0
            term = term * min(weight, options.importance_cap)
        if reference is not None:
            term = term + options.kl_coefficient * KL[options.kl](logprobs[row, t] - reference[row, t])
        total = total + term
    return total / batch.mask.sum()


def assert_importance_is_told(metrics: dict[str, float], batch: ProcedureBatch, loss: LossOptions) -> None:
    if loss.importance_cap is None:
        assert "loss/importance_limited_fraction" not in metrics
        return
    ratio = (batch.old_logprobs - batch.behaviour_logprobs)[batch.mask].exp()
    limited = ((ratio > loss.importance_cap) | (ratio < (loss.importance_floor or 0.0))).float().mean()
    assert metrics["loss/importance_limited_fraction"] == pytest.approx(float(limited))


@pytest.mark.parametrize("train_branches", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        LossOptions(),
        LossOptions(kl="k1", kl_coefficient=0.3),
        LossOptions(kl="k2", kl_coefficient=0.3),
        LossOptions(kl="k3", kl_coefficient=0.3),
        LossOptions(importance_cap=0.9),
        # Trainer and sampler agree up to rounding: about half of the tokens are above, half below.
        LossOptions(importance_cap=1.0, importance_mode="mask"),
        LossOptions(importance_cap=2.0, importance_mode="mask", importance_floor=1.0),
    ],
    ids=["plain", "k1", "k2", "k3", "importance_cap", "masked_above", "masked_below"],
)
def test_the_gradient_is_that_of_the_loss_on_paper(checkpoint, loss, train_branches) -> None:
    run = Run(checkpoint, max_steps=2, loss=loss, optimizer=NO_CLIPPING, train_branches=train_branches)
    catcher, module, logger = train(run)
    start = catcher.before[0]
    for step in range(2):  # in the second one the policy has left the one that sampled
        batch = catcher.batches[step]
        reference = None
        if loss.kl != "none":
            reference = logprobs_of(module, start, batch).detach()
        module.zero_grad()
        expected = paper_loss(logprobs_of(module, catcher.before[step], batch), batch, loss, reference)
        expected.backward()
        for name, parameter in module.policy.trainable():
            torch.testing.assert_close(catcher.gradients[step][name], parameter.grad, atol=2e-6, rtol=1e-4, msg=name)
        metrics = logger.steps[step + 1]
        assert_importance_is_told(metrics, batch, loss)
        norm = torch.stack([g.norm() for g in catcher.gradients[step].values()]).norm()
        assert metrics["loss/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        if reference is not None:
            difference = (logprobs_of(module, catcher.before[step], batch) - reference)[batch.mask].detach()
            expected_kl = float(KL[loss.kl](difference).mean())
            assert metrics["loss/kl_reference"] == pytest.approx(expected_kl, abs=1e-5)
            assert (expected_kl != 0) == (step == 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_mode": "mask"}, "importance_mode: mask has no effect without importance_cap"),
        (
            {"importance_cap": 2.0, "importance_floor": 0.5},
            "importance_floor has no effect without importance_mode: mask",
        ),
        (
            {"importance_cap": 2.0, "importance_floor": 2.0, "importance_mode": "mask"},
            "importance_floor must be between 0 and importance_cap = 2, got 2; 0.5 is usual",
        ),
    ],
)
def test_a_correction_without_effect_is_refused(options, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LossOptions(**options)


def test_micro_batches_change_nothing(checkpoint) -> None:
    # One row each, about four, all together.
    each, some, together = (
        train(Run(checkpoint, max_steps=1, optimizer=NO_CLIPPING, micro_batch_tokens=tokens, train_branches=True))
        for tokens in (1, 320, 10**6)
    )
    for cut in (each, some):
        for name, gradient in cut[0].gradients[0].items():
            torch.testing.assert_close(gradient, together[0].gradients[0][name], atol=1e-6, rtol=0, msg=name)
        for name, value in cut[2].steps[1].items():
            if name.startswith("loss/"):
                assert value == pytest.approx(together[2].steps[1][name], abs=1e-6), name
    padding = [run[2].steps[1]["time/padding_share"] for run in (each, some, together)]
    lengths = together[0].batches[0].sequences.lengths
    assert (
        padding[0] == 0.0 < padding[1] < padding[2] == pytest.approx(float(1 - lengths.float().mean() / lengths.max()))
    )


@pytest.mark.parametrize("tokens", [150, 10**6])
def test_shared_prefixes_change_nothing(checkpoint, tokens) -> None:
    run = Run(checkpoint, max_steps=2, optimizer=NO_CLIPPING, train_branches=True, micro_batch_tokens=tokens)
    run.score_batch_tokens, run.loss = tokens, LossOptions(kl="k3", kl_coefficient=0.1)
    alone = train(run)
    run.shared_prefixes = True
    packed = train(run)
    for step in range(2):
        for name in ("old_logprobs", "current_logprobs", "entropies"):
            ours, theirs = (getattr(catcher.batches[step], name) for catcher in (packed[0], alone[0]))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=name)
        for name, gradient in packed[0].gradients[step].items():
            torch.testing.assert_close(gradient, alone[0].gradients[step][name], atol=1e-5, rtol=1e-4, msg=name)
    saved = [run[2].steps[1]["time/shared_token_share"] for run in (alone, packed)]
    assert saved[0] == 0.0
    batch = packed[0].batches[0]
    prompts = [len(tree.task.prompt_ids) for tree in batch.trees]
    every_prompt_once = sum(3 * prompt for prompt in prompts) / float(batch.sequences.lengths.sum())  # 4 rows each
    if tokens == 10**6:
        assert saved[1] > every_prompt_once  # and the branches' prefixes
    else:
        assert saved[1] > 0


def test_auto_shares_where_the_model_can_and_says_where_it_cannot(
    checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(checkpoint, max_steps=1, shared_prefixes="auto")
    assert train(run)[2].steps[1]["time/shared_token_share"] > 0
    assert "Common beginnings" not in caplog.text

    run.checkpoint = save_with_sliding_windows(checkpoint, tmp_path)
    with caplog.at_level("INFO"):
        assert train(run)[2].steps[1]["time/shared_token_share"] == 0
    assert "Common beginnings of sequences are computed for each of them: " in caplog.text
    assert "has layers of sliding_attention" in caplog.text
    run.shared_prefixes = True
    with pytest.raises(ConfigurationError, match=r"sliding_attention; set model\.shared_prefixes: false"):
        train(run)


@pytest.mark.parametrize(
    ("shared_prefixes", "device", "packs"), [("auto", "cpu", True), ("auto", "cuda", False), (True, "cuda", True)]
)
def test_auto_packs_nothing_for_a_gpu(checkpoint, shared_prefixes, device, packs) -> None:
    module = Run(checkpoint, shared_prefixes=shared_prefixes).module()
    module.configure_model()
    module._device = torch.device(device, 0)
    token_ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    sequences = PaddedSequences(token_ids, torch.tensor([3, 3]), torch.ones(2, 3, dtype=torch.bool))
    assert [chunk.packing is not None for chunk in module._split(sequences, 100)] == [packs]


def save_with_sliding_windows(checkpoint: str, directory: Path) -> str:
    """A copy whose only layer sees 64 tokens."""
    copied = shutil.copytree(checkpoint, directory / "sliding")
    config = json.loads((copied / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"]}
    (copied / "config.json").write_text(json.dumps(config))
    return str(copied)


@pytest.mark.parametrize("name", ["micro_batch_tokens", "score_batch_tokens"])
def test_a_budget_that_holds_nothing_is_refused(checkpoint, name) -> None:
    with pytest.raises(ConfigurationError, match=f"model.{name} must be at least 1, got 0"):
        Run(checkpoint, **{name: 0}).module()


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_with_weights_untouched_and_rollouts_saved(
    checkpoint, tmp_path: Path, place
) -> None:
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.before = weights_of(pl_module)
                if place == "loss":
                    batch.advantages[0, batch.mask[0]] = float("nan")
                else:
                    next(pl_module.policy.trainable())[1].register_hook(lambda gradient: gradient * float("inf"))

    run, poison = Run(checkpoint), Poison()
    module, data = run.module(), run.data()
    trainer = run.make_trainer([poison], default_root_dir=tmp_path, logger=False)
    what = {"loss": "the loss is nan at step 1; ", "gradient": "the gradient norm is (nan|inf) at step 1; "}[place]
    with pytest.raises(NonFiniteLossError, match=what + "the rollouts of this step are in ") as raised:
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == 1
    assert all(torch.equal(tensor, poison.before[name]) for name, tensor in weights_of(module).items())
    path = Path(str(raised.value).split(" are in ")[1])
    assert path.parent == tmp_path
    trees = [json.loads(line) for line in path.read_text().splitlines()]
    assert [len(tree["roots"]) for tree in trees] == [2] * 4


def test_a_batch_without_advantages_names_the_missing_callback(checkpoint) -> None:
    run = Run(checkpoint)
    trainer = run.make_trainer()
    trainer.callbacks = [c for c in trainer.callbacks if type(c).__name__ != "ProcedureAdvantageScaling"]
    with pytest.raises(ConfigurationError, match=r"batch.advantages is None: add .*ProcedureAdvantageScaling"):
        trainer.fit(run.module(), datamodule=run.data())


def test_the_previous_policy_is_that_of_the_phase_before(checkpoint) -> None:
    branching = BranchingOptions(2, 4, gain_baseline="previous")
    run = Run(checkpoint, max_steps=6, branching=branching, train_size=24)  # three phases of two mini-batches

    class Watch(L.Callback):
        """Weights at every step, and what score_previous said at that step."""

        def __init__(self) -> None:
            self.weights: list[dict[str, Tensor]] = []
            self.previous: list[Any] = []

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.weights.append(weights_of(pl_module))
            roots = [root for tree in batch.trees for root in tree.roots]
            self.previous.append((roots, pl_module.score_previous(roots, temperature=1.0)))

    watch = Watch()
    module, data = run.module(), run.data()
    trainer = run.make_trainer([watch])
    trainer.fit(module, datamodule=data)
    # Mini-batches:        phase 0   phase 1   phase 2
    phase_before_began_at = [0, 0, 0, 0, 2, 2]
    for step, started in enumerate(phase_before_began_at):
        roots, scores = watch.previous[step]
        with torch.no_grad():
            for name, parameter in module.policy.trainable():
                parameter.copy_(watch.weights[started][name])
        expected = module.score(roots, temperature=1.0)
        torch.testing.assert_close(scores, expected.logprobs, atol=0, rtol=0)
    logger = trainer.logger
    assert isinstance(logger, RecordingLogger)
    fallback = [step["branch/fallback_fraction"] for step in logger.steps.values() if "branch/score" in step]
    # Nothing to compare with in the first mini-batch; from the second phase on informative right after a sync too.
    assert fallback[0] == 1.0
    assert all(value < 0.5 for value in fallback[2:])


def test_scoring_leaves_mode_weights_and_order_alone(checkpoint) -> None:
    run = Run(checkpoint, max_steps=1)
    catcher, module, _ = train(run)
    roots = [root for tree in catcher.batches[0].trees for root in tree.roots]
    module.train()
    before = weights_of(module)
    scores = module.score(roots, temperature=1.0)
    lengths = [len(root.response_ids) for root in roots]
    backwards = module.score(roots[::-1], temperature=1.0).split(lengths[::-1])[::-1]
    assert module.policy.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(module).items())
    for root, score, again in zip(roots, scores.split(lengths), backwards, strict=True):
        assert score.logprobs.shape == score.entropies.shape == (len(root.response_ids),)
        torch.testing.assert_close(score.logprobs, again.logprobs, atol=1e-6, rtol=0)
        assert not score.logprobs[~torch.tensor(root.sampled)].any()
        assert not score.logprobs.requires_grad
    nothing = module.score([], temperature=1.0)
    assert nothing.logprobs.shape == nothing.entropies.shape == (0,)


def test_the_reference_is_the_policy_at_the_start_also_after_a_restore(checkpoint, tmp_path: Path) -> None:
    loss = LossOptions(kl="k3", kl_coefficient=0.1)
    train(Run(checkpoint, str(tmp_path), max_steps=2, loss=loss))
    run = Run(checkpoint, str(tmp_path), max_steps=3, loss=loss)
    module, data = run.module(), run.data()
    run.make_trainer().fit(module, datamodule=data, ckpt_path=str(tmp_path / "last.ckpt"))
    fresh = run.module()
    fresh.configure_model()
    assert isinstance(module._reference, PolicySnapshot)
    for name, tensor in module._reference.state_dict().items():
        assert torch.equal(tensor, weights_of(fresh)[name])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("limits", [{"max_steps": 4}, {"max_epochs": 1}, {"max_epochs": 2, "limit_train_batches": 2}])
def test_a_falling_schedule_ends_with_the_run(checkpoint, schedule, limits) -> None:
    optimizer = OptimizerOptions(learning_rate=1e-3, schedule=schedule)
    run = Run(checkpoint, optimizer=optimizer, max_steps=-1, trainer=limits)
    rates = [step["loss/learning_rate"] for step in train(run)[2].steps.values() if "loss/learning_rate" in step]
    factors = {"linear": [1, 0.75, 0.5, 0.25], "cosine": [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]}[schedule]
    assert rates == pytest.approx([1e-3 * factor for factor in factors])


def test_a_falling_schedule_needs_an_end(checkpoint) -> None:
    run = Run(checkpoint, optimizer=OptimizerOptions(schedule="cosine"), max_steps=-1)
    with pytest.raises(ConfigurationError, match=r"needs a last step.*set trainer.max_steps"):
        run.make_trainer().fit(run.module(), datamodule=run.data())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_is_in_force_from_the_first_step(checkpoint, dtype) -> None:
    run = Run(checkpoint)
    module = run.module()
    module.policy_options.gradient_checkpointing = True
    module.policy_options.dtype = dtype
    module.configure_model()
    perturb(module.policy, seed=1)
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize(
    ("strategy", "precision", "message"),
    [
        (SingleDeviceStrategy(), "16-mixed", "use bf16-mixed"),
        (FSDPStrategy(), "32-true", "FSDPStrategy is not supported.*ModelParallelStrategy"),
    ],
)
def test_a_trainer_that_would_train_wrongly_is_refused(checkpoint, strategy, precision, message) -> None:
    module = Run(checkpoint).module()
    module._trainer = SimpleNamespace(strategy=strategy, precision=precision)  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match=message):
        module.setup("fit")


class HalfSilent(LetterReward):
    """Gives no value to responses of an odd number of letters."""

    def score(self, task: Task, response_text: str) -> Score:
        if response_text.count("e") % 2:
            return Score(None, success=False)
        return super().score(task, response_text)


def test_rollouts_without_a_value_are_neither_trained_on_nor_counted(checkpoint) -> None:
    run = Run(checkpoint, max_steps=3, train_branches=True)
    catcher, module, data = GradientCatcher(), run.module(), run.data()
    data.reward = HalfSilent()
    trainer = run.make_trainer([catcher], limit_val_batches=1.0, val_check_interval=1)
    trainer.fit(module, datamodule=data)
    data.close()
    logger = trainer.logger
    assert isinstance(logger, RecordingLogger)
    for number, batch in enumerate(catcher.batches, start=1):
        left_out = sum(tree.unscored for tree in batch.trees)
        kept = sum(len(tree.roots) + len(tree.branches) for tree in batch.trees)
        assert len(batch.rewards) == kept
        assert all(tree.unscored or len(tree.roots) == 2 for tree in batch.trees)
        logged = logger.steps[number]
        assert logged["rollout/unscored_share"] == pytest.approx(left_out / (left_out + kept))
        assert logged["val/tasks"] == pytest.approx(5 * (1 - logged["val/unscored_share"]))
    assert any(step["rollout/unscored_share"] > 0 for step in logger.steps.values())


def test_evaluation_mode_ends_where_it_began(checkpoint: str) -> None:
    module = Run(checkpoint).module()
    module.configure_model()
    module.train()
    with suppress(KeyError), module.evaluating():
        with module.scoring():
            assert not any(part.training for part in module.modules())
            assert not torch.is_grad_enabled()
        assert not module.policy.training  # the outer one goes on
        raise KeyError
    assert all(part.training for part in module.modules())
