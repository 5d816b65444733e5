"""Calibrate the embedded world: cold-start the tiny policy and measure what it can do on held-out questions.

    OMP_NUM_THREADS=1 python tools/calibrate_world.py                       # the quick start as configured
    OMP_NUM_THREADS=1 python tools/calibrate_world.py --ceiling             # the same without errors
    OMP_NUM_THREADS=1 python tools/calibrate_world.py --seeds 3 --steps 200 --error-rate 0.25

Prints, per seed: seconds of training, success of sampled and of greedy rollouts by number of hops, and the shares of
prompts of which all or none of the sampled rollouts succeed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from appo_lightning.policy.options import OptimizerOptions, PolicyOptions
from appo_lightning.rewards.tagged import AnswerReward
from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
from appo_lightning.rollout.prompts import build_task
from appo_lightning.rollout.seeds import derive_seed
from appo_lightning.samplers.transformers import TransformersSampler
from appo_lightning.sft import DemonstrationDataModule, SFTModule
from appo_lightning.tasks.lookup import LookupDemonstrations, LookupTasks, create_tiny_policy
from appo_lightning.tools.python import PythonTool
from appo_lightning.tools.search import SearchTool

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart" / "sft.yaml"


def train(config: dict[str, Any], folder: Path, seed: int) -> tuple[str, float]:
    """Create and train a policy; its directory and the CPU seconds of training."""
    tiny = create_tiny_policy(folder / "tiny", seed)
    data_options = dict(config["data"])
    source = LookupDemonstrations(**{**data_options.pop("source")["init_args"], "seed": 1000 + seed})
    model = config["model"]
    module = SFTModule(PolicyOptions(str(tiny)), OptimizerOptions(**model["optimizer"]), model["micro_batch_tokens"])
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=data_options["steps"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.process_time()
    trainer.fit(module, datamodule=DemonstrationDataModule(source, **{**data_options, "seed": seed}))
    seconds = time.process_time() - started
    module.export(str(folder / "trained"))
    return str(folder / "trained"), seconds


def evaluate(checkpoint: str, hops: list[float], *, prompts: int, rollouts: int, temperature: float) -> dict[str, Any]:
    """Success on held-out questions."""
    module = SFTModule(PolicyOptions(checkpoint))
    module.configure_model()
    tokenizer = module.policy.tokenizer
    limits = RolloutLimits(
        max_prompt_tokens=64, max_response_tokens=160, max_tool_calls=5, tool_workers=4, temperature=temperature
    )
    sampler, tools = TransformersSampler(), [SearchTool(top_k=1), PythonTool()]
    sampler.start(checkpoint, tokenizer, max_length=224)
    try:
        source = LookupTasks("validation", prompts, hops=hops)
        tasks = [build_task(source.row(i), tokenizer, max_prompt_tokens=64) for i in range(prompts)]
        prefixes = [Prefix(task, derive_seed("calibrate", task.id, n)) for task in tasks for n in range(rollouts)]
        trajectories = RolloutLoop(sampler, tools, tokenizer, limits).run(prefixes, policy_version=0)
    finally:
        sampler.close()
        for tool in tools:
            tool.close()
    reward = AnswerReward()
    by_hops: dict[int, list[bool]] = defaultdict(list)
    solved = []
    for i, task in enumerate(tasks):
        own = trajectories[i * rollouts : (i + 1) * rollouts]
        successes = [reward.score(task, trajectory.response_text).success for trajectory in own]
        by_hops[task.metadata["hops"]] += successes
        solved.append(sum(successes))
    lengths = [len(t.prompt_ids) + len(t.response_ids) for t in trajectories]
    return {
        "success": round(sum(solved) / (prompts * rollouts), 3),
        "by_hops": {n: round(sum(successes) / len(successes), 2) for n, successes in sorted(by_hops.items())},
        "none_of_group": round(sum(count == 0 for count in solved) / prompts, 2),
        "all_of_group": round(sum(count == rollouts for count in solved) / prompts, 2),
        "tokens_mean_max": (round(sum(lengths) / len(lengths)), max(lengths)),
    }


def main() -> None:
    """Train and evaluate once per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default 1)")
    parser.add_argument("--steps", type=int, help="optimiser steps, instead of those of the config")
    parser.add_argument("--error-rate", type=float, help="of the demonstrations, instead of that of the config")
    parser.add_argument("--ceiling", action="store_true", help="error rate 0")
    parser.add_argument("--hops", type=float, nargs="+", default=[1, 1, 1, 1], help="weights of the held-out questions")
    parser.add_argument("--prompts", type=int, default=128, help="held-out questions (default 128)")
    parser.add_argument("--rollouts", type=int, default=4, help="sampled rollouts of each (default 4)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = yaml.safe_load(options.config.read_text())
    source = config["data"]["source"]["init_args"]
    if options.steps is not None:
        config["data"]["steps"] = options.steps
    if options.error_rate is not None:
        source["error_rate"] = options.error_rate
    if options.ceiling:
        source["error_rate"] = 0.0
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, seconds = train(config, Path(folder), seed)
            print(f"seed {seed}: trained {config['data']['steps']} steps in {seconds:.0f} CPU seconds", flush=True)
            for name, count, temperature in (("sampled", options.rollouts, 1.0), ("greedy", 1, 0.0)):
                result = evaluate(
                    checkpoint, options.hops, prompts=options.prompts, rollouts=count, temperature=temperature
                )
                print(f"seed {seed}: {name}: {result}", flush=True)


if __name__ == "__main__":
    main()
