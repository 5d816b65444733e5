"""Search by meaning against search by words, on a cache of web searches: what each finds, and what it costs.

    OMP_NUM_THREADS=1 python tools/bench_dense.py --cache search_cache.json --encoder ENCODER

The cache maps queries to results, ``{"query": "Page 1: ...\\nPage 2: ..."}``. All its pages are the documents. A query
has found something where one of the pages is shown that the cache holds for it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from appo_lightning.tools.base import Tool
from appo_lightning.tools.dense import DenseSearchTool
from appo_lightning.tools.search import SearchTool
from appo_lightning.types import Task
from benchmarking import write_figures

TASK = Task("bench", [], ())
SHOWN = 80  # characters by which a page is recognised


def pages_of(cache: dict[str, str]) -> dict[str, list[str]]:
    """The pages of each query's result."""
    return {
        query: [page.strip() for page in re.split(r"(?:^|\n)Page \d+: ", result) if page.strip()]
        for query, result in cache.items()
    }


def measure(tool: Tool, pages: dict[str, list[str]], queries: list[str]) -> dict[str, float]:
    """What one tool finds."""
    began = time.perf_counter()
    session = tool.open(TASK)
    ready_s = time.perf_counter() - began
    found, times = 0, []
    for query in queries:
        began = time.perf_counter()
        result = session.call(query)
        times.append(time.perf_counter() - began)
        found += any(page[:SHOWN] in result for page in pages[query])
    session.close()
    tool.close()
    return {"found": found / len(queries), "query_ms": 1000 * statistics.median(times), "ready_s": ready_s}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="a JSON file of queries and results")
    parser.add_argument("--encoder", required=True, help="directory or Hub id of a transformers encoder")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()

    pages = pages_of(json.loads(options.cache.read_text()))
    documents = list(dict.fromkeys(page for of_query in pages.values() for page in of_query))
    queries = random.Random(0).sample(list(pages), min(options.queries, len(pages)))
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place) / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        tools: dict[str, Tool] = {
            "by words": SearchTool(str(corpus), index_dir=f"{place}/words"),
            "by meaning": DenseSearchTool(
                str(corpus), options.encoder, f"{place}/meaning", max_tokens=options.max_tokens
            ),
        }
        rows: dict[str, Any] = {name: measure(tool, pages, queries) for name, tool in tools.items()}

    print(f"{f'{len(documents):,} pages, {len(queries)} queries':32}{'found':>8}{'ms a query':>12}{'ready, s':>10}")
    for name, row in rows.items():
        print(f"{name:32}{row['found']:8.1%}{row['query_ms']:12.1f}{row['ready_s']:10.1f}")
    write_figures(options.json, {"documents": len(documents), "rows": rows})


if __name__ == "__main__":
    main()
