"""Imports the classes that a YAML file may name, so that short names work and ``--help`` lists them."""

from __future__ import annotations

import importlib

COMPONENTS = (
    "appo_lightning.samplers.vllm",
    "appo_lightning.samplers.transformers",
    "appo_lightning.tools.python",
    "appo_lightning.tools.search",
    "appo_lightning.rewards.tagged",
    "appo_lightning.rewards.mathematics",
    "appo_lightning.tasks.lookup",
    "appo_lightning.tasks.chat",
    "appo_lightning.tasks.questions",
)


def import_components() -> None:
    """Import every built-in sampler, tool, reward and task source."""
    for name in COMPONENTS:
        importlib.import_module(name)
