"""A training run on record is repeated without its tools, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest

from appo_lightning.errors import ToolBroken
from appo_lightning.samplers.transformers import TransformersSampler
from appo_lightning.tools.cassette import CassetteTool
from appo_lightning.tools.search import SearchTool
from helpers import training
from helpers.training import Run, fit, make_checkpoint


class MoodySearch(SearchTool):
    """Answers with another document every time."""

    calls: list[str] = []  # noqa: RUF012  # of the class: no option

    def run(self, argument, task):
        self.calls.append(argument)
        documents = task.metadata["documents"]
        return documents[len(self.calls) % len(documents)]


class TapedRun(Run):
    """A run whose search is on record."""

    path, mode = "", "record"

    def data(self, sampler=None):
        data = super().data(sampler)
        data.tools = [CassetteTool(MoodySearch(top_k=1), self.path, self.mode)]
        return data


def taped(checkpoint, path, mode, **changes):
    run = TapedRun(checkpoint, max_steps=3, **changes)
    run.path, run.mode = str(path), mode
    # One at a time: the last digits of a log-prob depend on what else is in a batch, and so on the timing of tools.
    return fit(run, sampler=TransformersSampler(max_batch_size=1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "TAG_LEAN", 0.5)  # more calls, and more that are well formed
        return make_checkpoint(tmp_path_factory.mktemp("policy"), hidden_size=32, num_layers=1)


def test_a_run_is_replayed_without_its_tool(checkpoint, tmp_path, monkeypatch):
    first = taped(checkpoint, tmp_path / "calls.sqlite", "record")
    calls = len(MoodySearch.calls)
    assert calls > 10
    # Another recording meets other moods: so what follows is due to the record.
    assert taped(checkpoint, tmp_path / "other.sqlite", "record").rollouts != first.rollouts

    def unavailable(*_):
        raise AssertionError("no tool here")

    monkeypatch.setattr(MoodySearch, "open", unavailable)
    monkeypatch.setattr(MoodySearch, "run", unavailable)
    again = taped(checkpoint, tmp_path / "calls.sqlite", "replay")
    assert again.rollouts == first.rollouts
    assert again.series("loss/policy") == first.series("loss/policy")
    for name, weight in first.weights.items():
        np.testing.assert_array_equal(again.weights[name], weight)
    assert set(again.series("tools/search_cache_hit_rate")) == {1.0}


def test_another_run_than_the_recorded_one_stops(checkpoint, tmp_path):
    taped(checkpoint, tmp_path / "calls.sqlite", "record")
    with pytest.raises(ToolBroken, match="holds no answer of 'search'"):
        taped(checkpoint, tmp_path / "calls.sqlite", "replay", seed=1)
