"""Imports the classes that a YAML file may name, so that short names work and ``--help`` lists them."""

from __future__ import annotations

import importlib
import inspect

COMPONENTS = (
    "appo_lightning.samplers.vllm",
    "appo_lightning.samplers.transformers",
    "appo_lightning.tools.python",
    "appo_lightning.tools.search",
    "appo_lightning.tools.dense",
    "appo_lightning.tools.function",
    "appo_lightning.tools.mcp",
    "appo_lightning.tools.web",
    "appo_lightning.tools.cassette",
    "appo_lightning.tools.backends.docker",
    "appo_lightning.tools.backends.http",
    "appo_lightning.rewards.tagged",
    "appo_lightning.rewards.mathematics",
    "appo_lightning.rollout.formats.tags",
    "appo_lightning.rollout.formats.hermes",
    "appo_lightning.tasks.lookup",
    "appo_lightning.tasks.chat",
    "appo_lightning.tasks.questions",
)


def import_components() -> None:
    """Import every built-in sampler, tool, reward, call format and task source."""
    for name in COMPONENTS:
        importlib.import_module(name)


def component_names() -> list[str]:
    """Names of the built-in classes of those modules."""
    names = set()
    for module_name in COMPONENTS:
        module = importlib.import_module(module_name)
        public = (value for name, value in vars(module).items() if not name.startswith("_"))
        names |= {cls.__name__ for cls in public if inspect.isclass(cls) and cls.__module__.startswith(module_name)}
    return sorted(names)
