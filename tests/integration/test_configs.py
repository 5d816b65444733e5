"""Every YAML file is valid, alone or over the config that it is meant for."""

from pathlib import Path

import pytest
import yaml

from appo_lightning.cli_parser import ShortErrorParser
from appo_lightning.lightning_cli import find_stage
from helpers.parsed import ParsedOnly

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart" / "appo.yaml"
# Overlays change a few keys of a whole config; the others stand alone.
WHOLE = sorted({*CONFIGS.glob("quickstart/*.yaml"), *CONFIGS.glob("data/*.yaml"), *CONFIGS.glob("experiment/*.yaml")})
OVERLAYS = sorted(path for name in ("algorithm", "tools", "trainer") for path in CONFIGS.glob(f"{name}/*.yaml"))


def _parse(*configs: Path) -> dict:
    arguments = [argument for config in configs for argument in ("--config", str(config))]
    cli = ParsedOnly(find_stage(arguments), "fit", arguments, execute=False)
    assert isinstance(cli.parser, ShortErrorParser)
    return cli.config["fit"].as_dict()


def _is_overlay(path: Path) -> bool:
    return "stage" not in yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_parses(path):
    parsed = _parse(QUICKSTART, path) if _is_overlay(path) else _parse(path)
    assert parsed["model"]["policy"]["path"]


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_overlay_parses_over_the_quick_start(path):
    assert _is_overlay(path), "an overlay has no stage of its own"
    assert _parse(QUICKSTART, path)["data"]["train"]


def test_every_config_is_tested():
    assert {*WHOLE, *OVERLAYS} == set(CONFIGS.rglob("*.yaml"))


def test_grpo_is_appo_without_branches_and_scaling():
    parsed = _parse(QUICKSTART, CONFIGS / "algorithm" / "grpo.yaml")
    branching = parsed["data"]["branching"]
    assert branching["num_roots"] == branching["num_rollouts"]
    assert parsed["advantage"]["scaling"] == 0


@pytest.mark.parametrize(("name", "criterion"), [("appo_entropy", "entropy"), ("appo_random", "random")])
def test_ablation_changes_the_criterion_alone(name, criterion):
    base, changed = _parse(QUICKSTART), _parse(QUICKSTART, CONFIGS / "algorithm" / f"{name}.yaml")
    assert changed["data"]["branching"].pop("criterion") == criterion
    assert base["data"]["branching"].pop("criterion") == "branching_score"
    assert {**changed, "config": None} == {**base, "config": None}
