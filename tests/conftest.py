"""What every test may ask for: a directory of sample data in the published formats."""

import json
import os
from pathlib import Path

# Before torch is imported: on a busy machine a second spinning thread makes tiny models several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

# A shared machine stalls now and then: that is no property of the code.
hypothesis.settings.register_profile("steady", deadline=None)
hypothesis.settings.load_profile("steady")

# The published files lost the "\b" of "\boxed" to a backspace character.
SYSTEM = "Answer inside <answer> </answer>, for example \\[ \x08oxed{answer here} \\]; the end is in \x08oxed{}."


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory) -> Path:
    """Directory with ``rl/*.parquet``, ``search/search_cache.json`` and ``benchmarks/*.jsonl``.

    The real files where the environment variable ``APPO_TEST_DATA`` names them; otherwise a few made-up rows that hold
    every quirk of the real ones.
    """
    if real := os.environ.get("APPO_TEST_DATA"):
        return Path(real)
    directory = tmp_path_factory.mktemp("sample_data")
    _write_chat_rows(directory / "rl")
    _write_search_cache(directory / "search")
    _write_benchmarks(directory / "benchmarks")
    return directory


def _write_chat_rows(directory: Path) -> None:
    directory.mkdir()
    questions = {
        # One row's answer is a blank.
        "train_10k": [("What is $3 \\cdot 4$?", "12", "math"), ("Who wrote Emma?", "Jane Austen", "qa")] * 6
        + [("How far is it?", " ", "qa")],
        "valid": [("Who is older, Ada Quill or Ben Rook?", "Ada Quill", "qa"), ("Solve $x-3=1$.", "4", "math")],
        "hard_search_1k": [("who illustrated the first pooh books", "E. H. Shepard", None)] * 4,
    }
    for name, rows in questions.items():
        # The deep-search file has no ability, no reward style, no need_tools_kwargs.
        lean = name == "hard_search_1k"
        records = [
            {
                "data_source": "made_up",
                "prompt": [{"content": SYSTEM, "role": "system"}, {"content": question, "role": "user"}],
                "ability": ability,
                "reward_model": {"ground_truth": answer} | ({} if lean else {"style": "rule"}),
                "extra_info": {"index": index, "question": question, "split": "train"}
                | ({} if lean else {"need_tools_kwargs": True}),
                "metadata": None,
            }
            for index, (question, answer, ability) in enumerate(rows)
        ]
        pq.write_table(pa.Table.from_pylist(records), directory / f"{name}.parquet")


def _write_search_cache(directory: Path) -> None:
    directory.mkdir()
    cache = {
        "Amy Smart film debut Campfire Tales": "Page 1: Campfire Tales is a 1997 anthology horror film …\n"
        "Page 2: Amy Smart made her debut in a television thriller …\nPage 3: Four people tell scary stories.",
        "search query: What nationality was Yuri Ozerov?": "Page 1: Yuri Ozerov was a Soviet film director.\n"
        "Page 2: Jan 26, 1921 · Özerov was born in Moscow.",
        "search query: a thing that nobody wrote about": "No search results found.",
        "tallest lighthouse": "Page 1: The Jeddah Light stands 133 metres tall.",
    }
    (directory / "search_cache.json").write_text(json.dumps(cache, ensure_ascii=False, indent=2), encoding="utf-8")


def _write_benchmarks(directory: Path) -> None:
    directory.mkdir()
    benchmarks: dict[str, list[dict[str, object]]] = {
        "gsm8k": [
            {"question": "Four boxes of 4 eggs?", "answer": "4 * 4 = <<4*4=16>>16 eggs.\n#### 16", "idx": 0},
            {"question": "25 times 85?", "answer": "That is <<25*85=2125>>2125.\n#### 2,125", "idx": 1},
        ],
        "math500": [{"question": "Convert $(0,3)$ to polar.", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)"}],
        "aime24": [
            {
                "id": 60,
                "problem": "Aya walks.",
                "solution": "...",
                "answer": "204",
                "url": "u",
                "question": "Aya walks.",
            }
        ],
        "hotpotqa": [{"question": "Who presented the bid?", "answer": ["Frank Lowy"]}],
        "2wiki": [{"question": "Where was the director born?", "answer": ["New York", "New York City", "NYC"]}],
        "bamboogle": [{"question": "Which rocket?", "answer": ["Titan IIIE"]}],
        "webwalker": [
            {"question": "When did it start?", "answer": "September 2022.", "root_url": "u", "info": {"lang": "en"}}
        ],
    }
    for name, rows in benchmarks.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
