"""DenseSearchTool with a tiny encoder made here."""

import copy
import json

import numpy as np
import pytest
import torch

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.tools import dense
from appo_lightning.tools.dense import DenseSearchTool, nearest
from appo_lightning.types import Task
from helpers.tiny_encoder import save_tiny_encoder

TASK = Task("task-0", [1], ("x",))
DOCUMENTS = ["red lamp", "green door", "blue boat on the lake", "red red red"]
WORDS = ["red", "lamp", "green", "door", "blue", "boat", "on", "the", "lake", "q"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"), WORDS)


@pytest.fixture
def make(encoder, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))

    def make_tool(**options):
        options = {"max_tokens": 16, "batch_size": 3, "top_k": 1} | options
        return DenseSearchTool(str(path), encoder, str(tmp_path / "index"), **options)

    return make_tool


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_text_is_nearest_to_itself(make, pooling):
    tool = make(pooling=pooling)
    assert [tool.open(TASK).call(text) for text in DOCUMENTS] == DOCUMENTS


def test_vectors_do_not_depend_on_what_else_is_in_the_batch(make):
    tool = make()
    tool.open(TASK)
    together = np.asarray(tool._index[1])
    alone = np.concatenate([tool._encoder.vectors([text]) for text in DOCUMENTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_pooling_takes_what_it_says(make):
    tool = make()
    encoder = tool._opened()[0]
    states, mask = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[1, 1, 0], [1, 1, 1]])
    # Row 0 has the tokens (0, 1) and (2, 3); row 1 (6, 7), (8, 9) and (10, 11).
    expected = {"mean": [[1, 2], [8, 9]], "cls": [[0, 1], [6, 7]], "last": [[2, 3], [10, 11]]}
    for pooling, values in expected.items():
        encoder._pooling = pooling
        assert encoder._pooled(states, mask).tolist() == values


def test_nearest_is_exact_across_blocks(monkeypatch):
    monkeypatch.setattr(dense, "_BLOCK", 7)
    rng = np.random.default_rng(0)
    vectors, query = rng.normal(size=(50, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    assert nearest(vectors, query, 5) == np.argsort(-(vectors @ query), kind="stable")[:5].tolist()
    assert nearest(np.ones((9, 2), np.float32), np.ones(2, np.float32), 3) == [0, 1, 2]


def test_prefixes_reach_the_encoder(make):
    plain, prefixed = make(), make(query_prefix="q q q q ")
    with_prefix = plain.open(TASK).call("q q q q red lamp")
    assert prefixed.open(TASK).call("red lamp") == with_prefix


def test_vectors_are_computed_once(make, monkeypatch):
    make().open(TASK)
    monkeypatch.setattr(dense, "_write_vectors", None)
    assert make(top_k=2).open(TASK).call("red lamp").startswith("Page 1: red lamp\nPage 2: ")
    with pytest.raises(TypeError):
        make(document_prefix="the ").open(TASK)


def test_a_copied_tool_still_searches(make):
    assert copy.deepcopy(make()).open(TASK).call("green door") == "green door"


@pytest.mark.parametrize("query", ["", " \n", "\ud800", "\x00"])
def test_odd_queries(make, query):
    assert bool(make().open(TASK).call(query)) == bool(query.strip())


def test_what_cannot_work_is_refused(make, encoder, tmp_path, sample_data):
    with pytest.raises(ConfigurationError, match=r"expected a transformers encoder at '.*nowhere', found"):
        DenseSearchTool(make().corpus, str(tmp_path / "nowhere"), str(tmp_path)).open(TASK)
    with pytest.raises(DataError, match=r"corpus must be a .jsonl or .parquet file"):
        DenseSearchTool(str(sample_data / "search" / "search_cache.json"), encoder, str(tmp_path))
    with pytest.raises(ConfigurationError, match="batch_size must be at least 1"):
        make(batch_size=0)
