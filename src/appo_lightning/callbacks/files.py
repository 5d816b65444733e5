"""What a run leaves behind besides TensorBoard: a validation report, predicted rollouts, an exported policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L

from appo_lightning.batching import EvaluationBatch
from appo_lightning.errors import ConfigurationError
from appo_lightning.policy_module import PolicyModule
from appo_lightning.reports.text import render_tree
from appo_lightning.rollout.serialise import tree_to_dict


class EvaluationReport(L.Callback):
    """After ``validate`` or ``test``: writes the metrics as JSON and some rollouts as readable text into the log
    directory.

    Args:
        samples: rollouts in the text file.
    """

    def __init__(self, samples: int = 4) -> None:
        if samples < 0:
            raise ConfigurationError(f"report.samples must be at least 0, got {samples}")
        self.samples = samples
        self._texts: list[str] = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EvaluationBatch, *args: Any
    ) -> None:
        module: Any = trainer.lightning_module
        for tree in batch.trees[: self.samples - len(self._texts)]:
            self._texts.append(render_tree(tree, module.policy.tokenizer))

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EvaluationBatch, *args: Any
    ) -> None:
        self.on_validation_batch_end(trainer, pl_module, outputs, batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "validation")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "test")

    def _write(self, trainer: L.Trainer, stage: str) -> None:
        texts, self._texts = self._texts, []
        directory = trainer.log_dir  # collective
        if not trainer.is_global_zero or directory is None:
            return
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        prefix = {"validation": "val/", "test": "test/"}[stage]
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
        metrics["step"] = float(trainer.global_step)
        (folder / f"{stage}.json").write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
        (folder / f"{stage}_rollouts.txt").write_text("\n\n".join(texts) + "\n")


class RolloutWriter(L.Callback):
    """``appo predict``: writes every rollout as a line of JSON.

    Args:
        path: the file; null writes ``rollouts.jsonl`` into the log directory. Each process adds its rank to the name.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Now, not after the last rollout.
        self._file(trainer).touch()

    def _file(self, trainer: L.Trainer) -> Path:
        path = Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / "rollouts.jsonl")
        if trainer.world_size > 1:
            path = path.with_name(f"{path.stem}.rank{trainer.global_rank}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EvaluationBatch, *args: Any
    ) -> None:
        path = self._file(trainer)
        with path.open("w") as file:
            file.writelines(json.dumps(tree_to_dict(tree)) + "\n" for tree in batch.trees)
        print(f"{len(batch.trees)} rollout trees written to {path}")


class ExportPolicy(L.Callback):
    """At the end of training: writes the policy as an ordinary transformers checkpoint.

    Args:
        path: the directory; null writes nothing.
        merge: with LoRA, fold the adapters into the weights; false writes the adapters alone, for PEFT.
    """

    def __init__(self, path: str | None = None, merge: bool = True) -> None:
        self.path, self.merge = path, merge

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.path is None:
            return
        # Now, not after hours of training.
        assert isinstance(pl_module, PolicyModule)
        pl_module.check_export(merge=self.merge)
        if trainer.is_global_zero:
            Path(self.path).mkdir(parents=True, exist_ok=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A trial must not take the place of a trained policy.
        if self.path is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            assert isinstance(pl_module, PolicyModule)
            pl_module.export(self.path, merge=self.merge)
