"""Measure local search: building an index, its size, memory, and queries per second.

    python tools/bench_search.py --json runs/bench_search.json

Makes a corpus of words as uneven as those of a language (the n-th most frequent has a share of 1/n), builds its index
in one process and searches it in others. A later run with the same directory and sizes finds corpus and index there.
Queries are of two kinds: ``mixed`` words are drawn as those of the corpus are, function words and all; ``content``
words are the rarer half of the words of a passage, as a question about something names them. ``all documents`` scores
every document that shares a word, as bm25s does without pruning; both contestants take turns on the same queries.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from appo_lightning.tools.corpus import Corpus, words_of
from appo_lightning.tools.search import SearchTool
from appo_lightning.types import Task

TASK = Task("bench", [], ())
VOCABULARY = 500_000
QUERY_WORDS = 6


def passages(count: int, length: int) -> Iterator[str]:
    """Random texts; always the same ones."""
    draw = np.random.default_rng(0)
    shares = np.cumsum(1.0 / np.arange(1, VOCABULARY + 1))
    while count > 0:
        size = min(count, 10_000)
        ranks = np.searchsorted(shares, draw.random((size, length)) * shares[-1])
        for row in ranks.tolist():
            yield " ".join([f"w{rank:x}" for rank in row])
        count -= size


def queries(texts: list[str], kind: str) -> list[str]:
    """Queries about some passages."""
    draw = random.Random(1)
    found = []
    for text in texts:
        words = text.split()
        if kind == "content":
            words = sorted(words, key=lambda word: int(word[1:], 16))[len(words) // 2 :]
        found.append(" ".join(draw.sample(words, min(QUERY_WORDS, len(words)))))
    return found


def all_documents(corpus: Corpus, query: str, top_k: int) -> list[int]:
    """The same result by scoring every document."""
    postings = corpus._postings
    totals = np.zeros(len(corpus), dtype=np.float32)
    for word in dict.fromkeys(words_of(query)):
        number = corpus._word_id(word)
        if number is not None:
            part = slice(postings.starts[number], postings.starts[number + 1])
            totals[postings.rows[part]] += postings.scores[part]
    (matching,) = np.nonzero(totals)
    return matching[np.argsort(-totals[matching], kind="stable")[:top_k]].tolist()


def in_a_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What work gives in a fresh process, whose memory is its own."""
    with side_by_side(1) as pool:
        return pool.submit(work, *arguments).result()


def side_by_side(processes: int) -> ProcessPoolExecutor:
    """Fresh processes."""
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def build(corpus: str, index: str) -> dict[str, float]:
    """Seconds of building the index, and the memory that takes."""
    started = time.monotonic()
    SearchTool(corpus, index_dir=index).open(TASK)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"build_s": time.monotonic() - started, "build_peak_mb": peak}


def memory_mb() -> dict[str, float]:
    """Resident memory of this process: its own, and what it shares as mapped files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    own = sizes["Private_Dirty"] + sizes.get("Swap", 0)
    return {"own_mb": own, "mapped_mb": sizes["Rss"] - own}


def search(corpus: str, index: str, asked: dict[str, list[str]], top_k: int, rounds: int) -> dict[str, Any]:
    """Loading time, memory, and seconds per query of both contestants in turns."""
    before = memory_mb()["own_mb"]
    started = time.monotonic()
    tool = SearchTool(corpus, index_dir=index, top_k=top_k)
    tool.open(TASK)
    result: dict[str, Any] = {"load_s": time.monotonic() - started}
    loaded = tool._shared_corpus(corpus)[0]
    for kind, texts in asked.items():
        for text in texts[:50]:
            assert loaded.rank(text, top_k) == all_documents(loaded, text, top_k), text
        pruned, exhaustive = [], []
        for _ in range(rounds):
            started = time.monotonic()
            for text in texts:
                tool.run(text, TASK)
            pruned.append(len(texts) / (time.monotonic() - started))
            some = texts[: max(1, len(texts) // 20)]
            started = time.monotonic()
            for text in some:
                all_documents(loaded, text, top_k)
            exhaustive.append(len(some) / (time.monotonic() - started))
        result[kind] = {
            "queries_per_s": statistics.median(pruned),
            "all_documents_per_s": statistics.median(exhaustive),
            "ratio": statistics.median(fast / slow for fast, slow in zip(pruned, exhaustive, strict=True)),
        }
    memory = memory_mb()
    return result | {"own_mb": memory["own_mb"] - before, "mapped_mb": memory["mapped_mb"]}


def throughput(corpus: str, index: str, texts: list[str], top_k: int) -> float:
    """Queries per second of one process among others."""
    tool = SearchTool(corpus, index_dir=index, top_k=top_k)
    tool.open(TASK)
    tool.run(texts[0], TASK)
    started = time.monotonic()
    for text in texts:
        tool.run(text, TASK)
    return len(texts) / (time.monotonic() - started)


def main() -> None:
    """Make, build, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--length", type=int, default=80, help="words of a passage")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="searching the same files side by side")
    parser.add_argument("--directory", default="runs/bench_search")
    parser.add_argument("--step", choices=("corpus", "build", "search"), default="search", help="stop after it")
    parser.add_argument("--json", help="write the figures here, too")
    options = parser.parse_args()

    directory = Path(options.directory) / f"{options.passages}x{options.length}"
    directory.mkdir(parents=True, exist_ok=True)
    corpus, index, told = directory / "corpus.jsonl", directory / "index", directory / "build.json"
    if not corpus.is_file():
        with corpus.with_suffix(".part").open("w") as file:
            file.writelines(f'{{"text": "{text}"}}\n' for text in passages(options.passages, options.length))
        corpus.with_suffix(".part").replace(corpus)
    if options.step == "corpus":
        return
    if not told.is_file():
        told.write_text(json.dumps(in_a_process(build, str(corpus), str(index))))
    if options.step == "build":
        return
    figures: dict[str, Any] = {"passages": options.passages, "length": options.length, **json.loads(told.read_text())}
    figures["index_mb"] = sum(path.stat().st_size for path in index.rglob("*") if path.is_file()) / 2**20
    some = list(passages(min(options.passages, options.queries), options.length))
    asked = {kind: queries(some, kind) for kind in ("content", "mixed")}
    figures |= in_a_process(search, str(corpus), str(index), asked, options.top_k, options.rounds)
    for kind, texts in asked.items():
        with side_by_side(options.processes) as pool:
            work = [
                pool.submit(throughput, str(corpus), str(index), texts, options.top_k) for _ in range(options.processes)
            ]
            figures[kind]["processes_per_s"] = sum(one.result() for one in work)

    print(f"{options.passages:,} passages of {options.length} words, {figures['index_mb']:,.0f} MB of index and texts")
    print(f"build                  {figures['build_s']:8.0f} s, peak {figures['build_peak_mb']:,.0f} MB")
    print(f"load                   {figures['load_s']:8.2f} s, {figures['own_mb']:,.0f} MB of its own per process")
    print(f"{'queries':18} {'per second':>12} {'all documents':>14} {'ratio':>7} {options.processes:>5} processes")
    for kind in asked:
        row = figures[kind]
        print(
            f"{kind:18} {row['queries_per_s']:12,.0f} {row['all_documents_per_s']:14,.0f} {row['ratio']:7.1f} "
            f"{row['processes_per_s']:15,.0f}"
        )
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
