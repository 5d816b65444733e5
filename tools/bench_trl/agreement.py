"""The two configurations of a case, read as files, and what they must have in common. Needs PyYAML alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Workload:
    """What a training step does, whoever does it."""

    prompts: int
    group_size: int
    response_tokens: int  # tool results included
    tool_calls: int  # of a response
    optimiser_steps: int  # with the same rollouts
    epochs: int
    rows: int  # of a forward and backward pass
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    schedule: str
    clip: tuple[float, float]
    kl: float

    @property
    def sequences(self) -> int:
        """Responses of a step."""
        return self.prompts * self.group_size


def read_appo(case: str) -> dict[str, Any]:
    """Our configuration: the case over the base."""
    return _over(_read(HERE / "appo" / "base.yaml"), _read(HERE / "appo" / f"{case}.yaml"))


def read_trl(case: str) -> dict[str, Any]:
    """TRL's: arguments of GRPOConfig."""
    return _read(HERE / "trl" / "base.yaml") | _read(HERE / "trl" / f"{case}.yaml")


def appo_workload(config: dict[str, Any]) -> Workload:
    """The step that our configuration describes."""
    data, model = config["data"], config["model"]
    row_tokens = data["rollout"]["max_prompt_tokens"] + data["rollout"]["max_response_tokens"]
    branching = data["branching"]
    assert branching["num_roots"] == branching["num_rollouts"], "GRPO has no branches"
    return Workload(
        prompts=data["prompts_per_phase"],
        group_size=branching["num_roots"],
        response_tokens=data["rollout"]["max_response_tokens"],
        tool_calls=data["rollout"].get("max_tool_calls", 0) if data.get("tools") else 0,
        optimiser_steps=data["prompts_per_phase"] // data["prompts_per_mini_batch"],
        epochs=data["epochs_per_phase"],
        rows=model["micro_batch_tokens"] // row_tokens,
        learning_rate=model["optimizer"]["learning_rate"],
        weight_decay=model["optimizer"]["weight_decay"],
        max_grad_norm=model["optimizer"]["max_grad_norm"],
        schedule=model["optimizer"]["schedule"],
        clip=(model["loss"]["clip_low"], model["loss"]["clip_high"]),
        kl=model["loss"].get("kl_coefficient", 0.0),
    )


def trl_workload(config: dict[str, Any]) -> Workload:
    """The step that TRL's configuration describes, on one process."""
    accumulation = config["gradient_accumulation_steps"]
    # TRL samples for one optimiser step at a time, unless told otherwise.
    steps_per_generation = config.get("steps_per_generation", accumulation)
    rollouts = config["per_device_train_batch_size"] * steps_per_generation
    return Workload(
        prompts=rollouts // config["num_generations"],
        group_size=config["num_generations"],
        response_tokens=config["max_completion_length"],
        tool_calls=config.get("max_tool_calling_iterations", 0),
        optimiser_steps=steps_per_generation // accumulation,
        epochs=config["num_iterations"],
        rows=config["per_device_train_batch_size"],
        learning_rate=config["learning_rate"],
        weight_decay=config["weight_decay"],
        max_grad_norm=config["max_grad_norm"],
        schedule=config["lr_scheduler_type"],
        clip=(config["epsilon"], config["epsilon_high"]),
        kl=config["beta"],
    )


def workload(case: str) -> Workload:
    """The workload of a case.

    Raises:
        ValueError: the two configurations differ.
    """
    ours, theirs = appo_workload(read_appo(case)), trl_workload(read_trl(case))
    if ours != theirs:
        names = [name for name in ours.__dataclass_fields__ if getattr(ours, name) != getattr(theirs, name)]
        found = ", ".join(f"{name} {getattr(ours, name)} and {getattr(theirs, name)}" for name in names)
        raise ValueError(f"case {case}: appo/ and trl/ must describe the same step, found {found}")
    return ours


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def _over(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _over(base[key], value) if both else value
    return merged
