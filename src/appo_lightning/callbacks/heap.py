"""What lives as long as the run is not searched for garbage."""

from __future__ import annotations

import lightning as L

from appo_lightning import heap


class FrozenHeap(L.Callback):
    """Keeps Python's garbage collector away from what exists when training starts.

    A full collection walks every object of torch, transformers, vLLM and Lightning: half a second each time on a CPU,
    1.5 % of the quick start (``docs/benchmarks/engine.md``). For a process that is the run's own: the ``appo`` command.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        heap.freeze()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        heap.thaw()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            heap.thaw()
