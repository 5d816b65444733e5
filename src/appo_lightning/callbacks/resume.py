"""Nothing is lost: random states in every checkpoint, files that are whole or absent, a clean stop on SIGTERM."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from appo_lightning.errors import RanksStopped, SamplerError, WeightSyncError
from appo_lightning.metrics import of_all_ranks


class RandomState(L.Callback):
    """Saves the random states of Python, NumPy and torch of every rank, and restores them before the first draw."""

    def __init__(self) -> None:
        self._stored: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": of_all_ranks(_random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stored = state_dict["ranks"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore(trainer)

    def _restore(self, trainer: L.Trainer) -> None:
        stored, self._stored = self._stored, None
        if stored is not None and len(stored) == trainer.world_size:
            _set_random_state(stored[trainer.global_rank])


def _random_state() -> dict[str, Any]:
    # Containers and tensors only: checkpoints are loaded with weights_only.
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then renames: a kill leaves the old file whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        # What a kill left behind; only one process of a run writes here.
        for leftover in target.parent.glob(f".*{target.suffix}.*.tmp"):
            leftover.unlink(missing_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            _flush_directory(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class GracefulStop(L.Callback):
    """On SIGTERM or SIGUSR1: finish the mini-batch, agree over ranks, save, stop. On a broken engine: save.

    Lightning's own handler talks to the other ranks inside the handler, which hangs when every rank is signalled.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name in ("SIGTERM", "SIGUSR1"):
            signal.signal(getattr(signal, name), self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.world_size > 1:
            number = torch.tensor(self.received or 0, device=pl_module.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.received = int(number) or None
        if self.received is None:
            return
        self._save(trainer)
        trainer.should_stop = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # An engine that broke for good: the steps before it are kept. A save waits for all processes: all must be here.
        together = trainer.world_size == 1 or isinstance(exception, RanksStopped | WeightSyncError)
        if isinstance(exception, SamplerError) and together and trainer.training and trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        checkpoint = trainer.checkpoint_callback
        folder = getattr(checkpoint, "dirpath", None) or trainer.default_root_dir
        trainer.save_checkpoint(os.path.join(str(folder), "last.ckpt"))
