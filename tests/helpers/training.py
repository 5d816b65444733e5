"""A whole training run in a few seconds: a tiny policy that calls a tool now and then, and a reward that varies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from appo_lightning.callbacks import (
    AtomicCheckpointIO,
    BranchStatistics,
    CreditStatistics,
    ProcedureAdvantageScaling,
    RandomState,
    RolloutStatistics,
    SamplerWeightSync,
    ToolCallEfficiency,
)
from appo_lightning.datamodule import RolloutDataModule
from appo_lightning.module import AppoModule, LossOptions
from appo_lightning.policy.options import LoraOptions, OptimizerOptions, PolicyOptions
from appo_lightning.rewards.base import Reward, Score
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.serialise import tree_to_dict
from appo_lightning.rollout.tree import BranchingOptions
from appo_lightning.samplers.base import Sampler
from appo_lightning.samplers.transformers import TransformersSampler
from appo_lightning.tasks.lookup import LookupTasks, create_tiny_policy
from appo_lightning.tools.search import SearchTool
from appo_lightning.types import Task

LORA = LoraOptions(rank=4, alpha=8.0)


class LetterReward(Reward):
    """Counts the letters e, tags and results included: differs between almost any two responses.

    Args:
        coarse: counts tens of them only: often the same.
    """

    def __init__(self, coarse: bool = False) -> None:
        self.coarse = coarse

    def score(self, task: Task, response_text: str) -> Score:
        count = response_text.count("e")
        value = float(count // 10) if self.coarse else count / 10
        return Score(value, success=value > 1, parts={"letters": value})


class RecordingLogger(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.steps.setdefault(step or 0, {}).update(metrics)


class BatchRecorder(L.Callback):
    """Keeps what was sampled for every step."""

    def __init__(self) -> None:
        self.rollouts: dict[int, dict[str, Any]] = {}
        self.versions: dict[int, list[int]] = {}
        self.branch_versions: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        self.rollouts[step] = {tree.task.id: without_seconds(tree_to_dict(tree)) for tree in batch.trees}
        self.versions[step] = batch.policy_version.tolist()
        self.branch_versions[step] = [b.trajectory.policy_version for tree in batch.trees for b in tree.branches]


def without_seconds(tree: dict[str, Any]) -> dict[str, Any]:
    """A rollout without the only thing in it that depends on the clock."""
    for trajectory in [*tree["roots"], *tree["branches"]]:
        for call in trajectory["tool_calls"]:
            call["seconds"] = 0.0
    return tree


@dataclass
class Run:
    """A training run, as values that can be sent to another process."""

    checkpoint: str
    output: str = ""  # where checkpoints go; nowhere if empty
    strategy: str = "auto"  # "auto", "ddp" or "fsdp2"
    lora: bool = False
    max_steps: int = 4
    prompts_per_phase: int = 8
    prompts_per_mini_batch: int = 4
    epochs_per_phase: int = 1
    train_size: int = 16
    branching: BranchingOptions = field(default_factory=lambda: BranchingOptions(2, 4))
    loss: LossOptions = field(default_factory=LossOptions)
    optimizer: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(learning_rate=1e-3))
    micro_batch_tokens: int = 240  # about three rows
    score_batch_tokens: int = 240
    shared_prefixes: bool | Literal["auto"] = False
    train_branches: bool = False
    resume: str | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    sync: dict[str, Any] = field(default_factory=dict)
    validation_size: int = 5
    seed: int = 0

    def module(self) -> AppoModule:
        return AppoModule(
            PolicyOptions(self.checkpoint, lora=LORA if self.lora else None),
            self.optimizer,
            self.loss,
            micro_batch_tokens=self.micro_batch_tokens,
            score_batch_tokens=self.score_batch_tokens,
            shared_prefixes=self.shared_prefixes,
        )

    def data(self, sampler: Sampler | None = None) -> RolloutDataModule:
        return RolloutDataModule(
            train=LookupTasks(size=self.train_size),
            validation=LookupTasks("validation", size=self.validation_size),
            sampler=sampler or TransformersSampler(),
            reward=LetterReward(coarse=self.branching.max_refills > 0),
            tools=[SearchTool(top_k=1)],
            rollout=RolloutLimits(max_prompt_tokens=64, max_response_tokens=36, max_result_tokens=8, max_tool_calls=2),
            branching=self.branching,
            prompts_per_phase=self.prompts_per_phase,
            prompts_per_mini_batch=self.prompts_per_mini_batch,
            epochs_per_phase=self.epochs_per_phase,
            train_branches=self.train_branches,
            seed=self.seed,
        )

    def make_trainer(self, callbacks: Sequence[L.Callback] = (), **changes: Any) -> L.Trainer:
        every: list[L.Callback] = [
            ProcedureAdvantageScaling(),
            SamplerWeightSync(**self.sync),
            RolloutStatistics(),
            BranchStatistics(),
            CreditStatistics(),
            ToolCallEfficiency(),
            RandomState(),
            *callbacks,
        ]
        if self.output:
            every.append(
                ModelCheckpoint(
                    dirpath=self.output,
                    save_top_k=0,
                    save_last=True,
                    every_n_train_steps=1,
                    enable_version_counter=False,
                )
            )
        options: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1 if self.strategy == "auto" else 2,
            "strategy": strategy(self.strategy),
            "max_steps": self.max_steps,
            "max_epochs": -1,
            "logger": RecordingLogger(),
            "callbacks": every,
            "plugins": [AtomicCheckpointIO()],
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": bool(self.output),
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0.0,
            "log_every_n_steps": 1,
            "default_root_dir": self.output or None,
        }
        return L.Trainer(**options | self.trainer | changes)


def strategy(name: str) -> Any:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend="gloo",
        )
    return name


@dataclass
class Result:
    """What a run left behind."""

    metrics: dict[int, dict[str, float]]  # by step; on rank 0
    rollouts: dict[int, dict[str, Any]]  # by step, by task: this rank's
    versions: dict[int, list[int]]
    branch_versions: dict[int, list[int]]
    weights: dict[str, Any]  # NumPy
    adapters: dict[str, Any]  # NumPy
    global_step: int
    should_stop: bool = False

    def series(self, name: str) -> list[float]:
        return [step[name] for _, step in sorted(self.metrics.items()) if name in step]


def fit(run: Run, callbacks: Iterable[L.Callback] = (), sampler: Sampler | None = None) -> Result:
    """Train to the end and tell."""
    torch.set_num_threads(1)
    module, data, recorder = run.module(), run.data(sampler), BatchRecorder()
    trainer = run.make_trainer([*callbacks, recorder])
    trainer.fit(module, datamodule=data, ckpt_path=run.resume, weights_only=True)
    data.close()
    return result_of(trainer, module, recorder)


def result_of(trainer: L.Trainer, module: AppoModule, recorder: BatchRecorder) -> Result:
    logger = trainer.logger
    return Result(
        metrics=logger.steps if isinstance(logger, RecordingLogger) else {},
        rollouts=recorder.rollouts,
        versions=recorder.versions,
        branch_versions=recorder.branch_versions,
        weights={name: weight.cpu().clone().numpy() for name, weight in module.policy.named_weights()},
        adapters={name: weight.clone().numpy() for name, weight in module.policy.adapter_weights().items()},
        global_step=trainer.global_step,
        should_stop=trainer.should_stop,
    )


def make_checkpoint(directory: Path, *, hidden_size: int = 32, num_layers: int = 2) -> str:
    """A tiny policy of the embedded world whose samples hold tags of tool calls about every eighth token."""
    create_tiny_policy(directory, hidden_size=hidden_size, num_layers=num_layers)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        # Every hidden state leans to one side, and so do the tags' rows of the head.
        embedding = policy.get_input_embeddings().weight
        embedding += 0.1
        for tag in ("<search>", "</search>"):
            embedding[tokenizer.convert_tokens_to_ids(tag)] += TAG_LEAN
    policy.save_pretrained(directory)
    return str(directory)


TAG_LEAN = 0.15

CALL_TOKENS = (
    '<tool_call>\n{"name": "search", "arguments": {"query": "age of Bako"}}\n</tool_call>',
    '<tool_call>\n{"name": "search", "arguments": {"query": "',
    '"}}\n</tool_call>',
    '<tool_call>\n{"name": "fly"}\n</tool_call>',
)


def make_function_checkpoint(directory: Path, template: str) -> str:
    """The same with a chat template for tools; its samples hold JSON function calls, whole, in parts and malformed."""
    make_checkpoint(directory, num_layers=1)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in CALL_TOKENS])
    tokenizer.chat_template = template
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        policy.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        embedding = policy.get_input_embeddings().weight
        embedding[-len(CALL_TOKENS) :] = 0.1 + torch.randn(len(CALL_TOKENS), embedding.shape[1]) * 0.2
        for token in (*tokenizer.convert_tokens_to_ids(list(CALL_TOKENS)), tokenizer.eos_token_id):
            embedding[token] += TAG_LEAN
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
