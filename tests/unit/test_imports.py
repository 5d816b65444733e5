"""Claims about who imports whom: layers point one way, and heavy packages stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import appo_lightning

SOURCE = Path(appo_lightning.__file__).parent

# docs: `types, errors, tokens, function_calls` <- `algorithm` | `samplers, tools, rewards, policy, tasks`
#       <- `rollout, batching`
#       <- `module, datamodule, sft, callbacks, reports` <- `cli`
LAYERS = [
    {"types", "errors", "heap", "tokens", "function_calls", "__init__"},
    {"algorithm", "samplers", "tools", "rewards", "policy", "tasks", "environment", "registry"},
    {"rollout", "batching", "metrics", "agreement"},
    {"module", "policy_module", "datamodule", "sources", "sft", "callbacks", "reports"},
    {"cli", "cli_parser", "lightning_cli"},
]
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)


def modules() -> dict[str, Path]:
    """Dotted name below the package, and file, of every module."""
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
        for path in sorted(SOURCE.rglob("*.py"))
        if "_sandbox" not in path.parts
    }


def imports_of(path: Path, *, at_runtime_only: bool = False) -> set[str]:
    """Absolute names of everything that a file imports, in functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    if at_runtime_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_parts(names: set[str]) -> set[str]:
    """First part below the package of our own imports."""
    return {name.split(".")[1] for name in names if name.startswith("appo_lightning.")} & set(LAYER_OF)


def test_every_part_of_the_package_has_a_layer():
    assert {name.split(".")[0] for name in modules()} - set(LAYER_OF) == set()


@pytest.mark.parametrize("name", modules())
def test_imports_point_to_lower_layers(name):
    own = name.split(".")[0]
    for other in own_parts(imports_of(modules()[name], at_runtime_only=True)):
        assert LAYER_OF[other] <= LAYER_OF[own], f"{name} imports {other}"


def test_the_algorithm_knows_only_types_and_errors_and_nobody_below_the_trainer_knows_lightning():
    for name, path in modules().items():
        part, names = name.split(".")[0], imports_of(path)
        if part == "algorithm":
            assert own_parts(names) <= {"algorithm", "types", "errors"}, name
        if LAYER_OF[part] <= LAYER_OF["rollout"] and name != "metrics":
            assert not any(other.split(".")[0] in ("lightning", "pytorch_lightning") for other in names), name


def test_only_the_vllm_sampler_imports_vllm():
    users = [name for name, path in modules().items() if any(i.split(".")[0] == "vllm" for i in imports_of(path))]
    assert sorted(users) == [
        *(f"samplers._vllm_{part}" for part in ("adapters", "cpu", "engine", "layers", "reading", "writing")),
        "samplers.vllm",
    ]


def test_concrete_samplers_tools_and_rewards_are_named_only_in_configurations():
    """The layers above know the contracts alone; the registry and the command line list class paths."""
    contracts = {"base", "_common", "read_back", "recording"}  # the last wraps any tool
    for name, path in modules().items():
        if LAYER_OF[name.split(".")[0]] not in (2, 3):
            continue
        for imported in imports_of(path, at_runtime_only=True):
            parts = imported.split(".")
            if parts[:1] == ["appo_lightning"] and parts[1] in ("samplers", "tools", "rewards"):
                assert parts[2] in contracts, f"{name} imports {imported}"


def test_algorithm_and_rollout_need_no_lightning_no_vllm_no_peft():
    run(
        """
import importlib, pkgutil, sys
for name in ("lightning", "pytorch_lightning", "vllm", "peft"):
    sys.modules[name] = None  # importing it now raises ImportError
import appo_lightning.algorithm, appo_lightning.batching, appo_lightning.rollout as rollout
names = [module.name for module in pkgutil.walk_packages(rollout.__path__, "appo_lightning.rollout.")]
assert {f"appo_lightning.rollout.{name}" for name in ("loop", "formats.tags", "phase", "tree")} <= set(names), names
for name in names:
    importlib.import_module(name)
"""
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_imports_no_torch_no_vllm_no_transformers(arguments):
    run(
        f"""
import sys
from appo_lightning.cli import main
assert main({arguments!r}) == 0
heavy = {{"torch", "vllm", "transformers", "lightning", "peft", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    )
