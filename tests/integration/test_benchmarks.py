"""The benchmarks run: not what they measure is tested, but that they still measure what is there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from helpers.tiny_encoder import save_tiny_encoder

TOOLS = Path(__file__).parents[2] / "tools"
NAMES = sorted(path.stem for path in TOOLS.glob("bench_*.py"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a benchmark in this process and give its figures."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def run(name: str, *arguments: str) -> dict:
        path = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--json", str(path)])
        importlib.import_module(name).main()
        return json.loads(path.read_text())

    return run


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_where_the_figures_go(run, name, capsys):
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_what_the_overhead_benchmark_watches_exists(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    for module, path, _ in importlib.import_module("bench_overhead").WATCHED:
        owner = importlib.import_module(module)
        for name in path.split("."):
            owner = getattr(owner, name)
        assert callable(owner), path


def test_scoring(run):
    figures = run("bench_scoring", "--lengths", "64", "128", "256", "--rounds", "1")
    assert figures["slopes"]


def test_search_by_meaning(run, tmp_path):
    cache = tmp_path / "cache.json"
    cache.write_text(json.dumps({"red lamp": "Page 1: a red lamp\nPage 2: a green door", "sea": "Page 1: the sea"}))
    encoder = save_tiny_encoder(tmp_path, ["red", "lamp", "green", "door", "sea", "a", "the"])
    figures = run("bench_dense", "--cache", str(cache), "--encoder", encoder, "--max-tokens", "16")
    assert figures["documents"] == 3
    assert figures["rows"]["by words"]["found"] == 1


@pytest.mark.engine
def test_rollouts(run, capsys):
    rows = ("one turn, 8", "1-7 turns, 50-300 ms, 8", "1 a root, tools at once")
    figures = run("bench_rollout", "--sequences", "8", "--many", "16", "--slots", "4", "--rounds", "1", "--only", *rows)
    assert set(rows) < set(figures["rows"])
    for row in figures["rows"].values():
        assert row["ratio"] > 0
        assert min(row["seconds"]["loop"] + row["seconds"]["other"]) > 0
    assert 0 < figures["rows"]["1 a root, tools at once"]["cached_prefix_share"] <= 1


@pytest.mark.engine
def test_engine_steps(run):
    (row,) = run("bench_engine_step", "--sequences", "4", "--tokens", "8", "--rounds", "1")["rows"]
    assert set(row["ratio"]) == {"vLLM's own", "norms", "draws", "ranks", "blocks", "logprobs", "all"}
    assert min(row["milliseconds"].values()) > 0


def test_updates(run):
    figures = run("bench_update", "--lengths", "--shapes", "quick start", "--rounds", "1")
    assert [row["shape"] for row in figures["shared_prefixes"]] == ["quick start"]


@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_training_steps(run):
    shape = ("--shape", "tiny", "--vocabulary", "600", "--steps", "2", "--prompts", "2", "--tokens", "40")
    (row,) = run("bench_gpu", *shape, "--ways", "LoRA, adapter")["rows"]
    assert row["sampled"] > 0
    assert row["trained"] > 0
