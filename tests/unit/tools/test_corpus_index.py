"""An index on disk: the same ranking, built once, and again only when the corpus changes."""

import json
import multiprocessing
import os
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.tools import search as search_module
from appo_lightning.tools._corpus_index import build_once, load_bm25
from appo_lightning.tools._ranking import _at_most_kth
from appo_lightning.tools.corpus import Corpus, words_of
from appo_lightning.tools.search import SearchTool
from appo_lightning.types import Task

TASK = Task("task-0", [1], ("x",))


def texts(count, seed=0, vocabulary=200):
    """Texts of words as uneven as those of a language."""
    rng = random.Random(seed)
    words = [f"w{number}" for number in range(vocabulary)]
    weights = [1 / (1 + number) for number in range(vocabulary)]
    return [" ".join(rng.choices(words, weights, k=rng.randint(1, 12))) for _ in range(count)]


def a_jsonl(tmp_path, documents, name="corpus.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def exhaustive(corpus, query, top_k):
    """Every document scored, as bm25s itself does it: added up in float32 in the order of the words."""
    postings = corpus._postings
    totals = np.zeros(len(corpus), dtype=np.float32)
    for word in dict.fromkeys(words_of(query)):
        if (number := corpus._word_id(word)) is not None:
            part = slice(postings.starts[number], postings.starts[number + 1])
            totals[postings.rows[part]] += postings.scores[part]
    (matching,) = np.nonzero(totals)
    return matching[np.argsort(-totals[matching], kind="stable")[:top_k]].tolist()


@pytest.mark.parametrize("top_k", [1, 3, 50, 1000])
def test_the_ranking_is_that_of_scoring_every_document(top_k):
    corpus = Corpus(texts(5000), k1=1.5, b=0.75)
    for query in [*texts(200, seed=1), "", "unknown", "w0", "w0 w1 w2 w3 w4 w5"]:
        assert corpus.rank(query, top_k) == exhaustive(corpus, query, top_k), query


@pytest.mark.parametrize(("size", "count"), [(0, 1), (4, 5), (5, 5), (900, 5), (5000, 5), (5000, 400), (200_000, 3)])
def test_a_threshold_never_stops_one_of_the_best(size, count):
    sums = np.random.default_rng(size).random(size).astype(np.float32)
    threshold = _at_most_kth(sums, count)
    assert (sums >= threshold).sum() >= min(size, count)
    if size >= count:
        assert (sums >= threshold).sum() <= 2 * count + 5  # and stops most others


def test_a_query_leaves_nothing_behind_for_the_next():
    corpus = Corpus(texts(300), k1=1.5, b=0.75)
    first = corpus.rank("w7 w8", 5)
    for query in texts(50, seed=2):
        corpus.rank(query, 3)
    assert corpus.rank("w7 w8", 5) == first


def test_an_index_on_disk_ranks_like_one_in_memory(tmp_path):
    documents = [*texts(300), "Özerov's lamp", "", "\ud83d\ude00 lamp"]
    path, index = a_jsonl(tmp_path, documents), str(tmp_path / "index")
    in_memory, on_disk = SearchTool(path, top_k=5), SearchTool(path, top_k=5, index_dir=index)
    for query in [*texts(100, seed=1), "OZEROV", "lamp", "nothing of it", ""]:
        assert on_disk.open(TASK).call(query) == in_memory.open(TASK).call(query)


def test_documents_without_words_can_be_indexed(tmp_path):
    tool = SearchTool(a_jsonl(tmp_path, ["…", ""]), index_dir=str(tmp_path / "index"))
    assert tool.open(TASK).call("lamp") == ""


def test_a_parquet_corpus(tmp_path):
    path = tmp_path / "corpus.parquet"
    rows = [
        {"contents": "A city in Sweden.", "name": "Lund", "more": 1},
        {"contents": "A red lamp.", "name": None, "more": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    options = {"top_k": 1, "text_field": "contents", "title_field": "name"}
    for index in (None, str(tmp_path / "index")):
        tool = SearchTool(str(path), index_dir=index, **options)
        assert [tool.open(TASK).call(query) for query in ("sweden", "lamp")] == [
            "Lund: A city in Sweden.",
            "A red lamp.",
        ]
    with pytest.raises(DataError, match=r"corpus.parquet, row 1: expected the document under 'text', found the fields"):
        SearchTool(str(path)).open(TASK)
    path.write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DataError, match="expected a Parquet file, found"):
        SearchTool(str(path)).open(TASK)


def test_an_index_is_built_once_and_again_for_another_corpus_or_other_options(tmp_path, monkeypatch):
    builds = []
    build = search_module.build_bm25
    monkeypatch.setattr(
        search_module, "build_bm25", lambda *args, **options: builds.append(1) or build(*args, **options)
    )
    path, index = a_jsonl(tmp_path, ["A red lamp."]), str(tmp_path / "index")

    def found(query, **options):
        return SearchTool(path, top_k=1, index_dir=index, **options).open(TASK).call(query)

    assert [found("lamp"), found("red")] == ["A red lamp."] * 2
    assert len(builds) == 1
    found("lamp", k1=1.2)
    assert len(builds) == 2
    a_jsonl(tmp_path, ["A green lamp and more."])
    assert found("lamp") == "A green lamp and more."
    assert len(builds) == 3


def test_a_build_that_was_killed_is_started_again(tmp_path):
    def half(place):
        (place / "texts.bin").write_bytes(b"A re")
        raise KeyboardInterrupt

    directory = tmp_path / "index" / "name"
    with pytest.raises(KeyboardInterrupt):
        build_once(directory, half)
    assert not directory.exists()
    build_once(directory, lambda place: (place / "texts.bin").write_bytes(b"A red lamp.") and {})
    assert (directory / "texts.bin").read_bytes() == b"A red lamp."
    assert json.loads((directory / "index.json").read_text()) == {}


def build_slowly(directory, log):
    def build(place):
        log.put(os.getpid())
        time.sleep(0.3)
        return {}

    build_once(directory, build)
    assert (directory / "index.json").is_file()


def test_processes_wait_for_the_one_that_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    log, directory = context.Queue(), tmp_path / "index" / "name"
    processes = [context.Process(target=build_slowly, args=(directory, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.get(timeout=5) in [process.pid for process in processes]
    assert log.empty()


def test_a_loaded_index_is_mapped_not_read(tmp_path):
    tool = SearchTool(a_jsonl(tmp_path, texts(50)), index_dir=str(tmp_path / "index"))
    tool.open(TASK)
    [directory] = [path for path in (tmp_path / "index").iterdir() if path.is_dir()]
    postings = load_bm25(directory)._postings
    for values in (postings.rows, postings.scores, postings.starts):
        assert isinstance(values.base, np.memmap)


def test_an_index_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="index_dir: expected a directory to write to, found: "):
        SearchTool(a_jsonl(tmp_path, ["a"]), index_dir=str(tmp_path / "file")).open(TASK)


@pytest.mark.parametrize("name", ["rows.npy", "word_hashes.npy", "offsets.npy", "texts.bin"])
def test_an_index_that_was_damaged_stops_the_run_with_a_line(tmp_path, name):
    tool = SearchTool(a_jsonl(tmp_path, ["one two", "two three"]), index_dir=str(tmp_path / "index"))
    tool.open(TASK)
    (file,) = (tmp_path / "index").rglob(name)
    file.write_bytes(file.read_bytes()[:-3])
    again = SearchTool(tool.corpus, index_dir=tool.index_dir)
    with pytest.raises(DataError, match=r"expected an index at .*, found it damaged \(.*\); delete that directory"):
        again.open(TASK)


def test_an_index_without_effect_is_refused(tmp_path, sample_data):
    for corpus in (None, str(sample_data / "search" / "search_cache.json")):
        with pytest.raises(ConfigurationError, match=r"index_dir has no effect with corpus = .*: it is for a .jsonl"):
            SearchTool(corpus, index_dir=str(tmp_path))
