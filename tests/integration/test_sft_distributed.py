"""Supervised fine-tuning on two processes does what it does on one."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from appo_lightning.policy.options import LoraOptions, OptimizerOptions, PolicyOptions
from appo_lightning.sft import DemonstrationDataModule, SFTModule
from appo_lightning.tasks.lookup import LookupDemonstrations, create_tiny_policy
from helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed]


def fit(path: str, strategy: str, lora: bool) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses by step and the final weights."""
    module = SFTModule(
        PolicyOptions(path, lora=LoraOptions(rank=4) if lora else None),
        OptimizerOptions(learning_rate=3e-4),
        micro_batch_tokens=250,  # ranks have different numbers of micro-batches
    )
    fsdp2 = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo")
    record = Losses()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=fsdp2 if strategy == "fsdp2" else strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record],
    )
    # Questions of one and of four hops: ranks see very different numbers of tokens.
    data = DemonstrationDataModule(LookupDemonstrations(size=200, hops=[1, 0, 0, 1]), batch_size=8, steps=4)
    trainer.fit(module, datamodule=data)
    return record.values, {name: weight.detach().cpu().numpy() for name, weight in module.policy.named_weights()}


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, *args) -> None:
        self.values.append(float(trainer.callback_metrics["sft/loss"]))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_like_one_process(tmp_path, strategy, lora):
    path = str(create_tiny_policy(tmp_path / "tiny", hidden_size=32, num_layers=1))
    torch.set_num_threads(1)
    losses, weights = fit(path, "auto", lora)
    for rank_losses, rank_weights in run_ranks(fit, path, strategy, lora):
        assert rank_losses == pytest.approx(losses, abs=1e-4)
        for name, weight in weights.items():
            # Sums in another order, through four steps of AdamW.
            np.testing.assert_allclose(rank_weights[name], weight, atol=2e-5, rtol=0, err_msg=name)
