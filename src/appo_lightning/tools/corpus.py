"""Texts that can be searched: a ranked collection, and the files it is read from."""

from __future__ import annotations

import json
import logging
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from appo_lightning.errors import DataError
from appo_lightning.tools._ranking import Postings

_WORD = re.compile(r"\w+")
_PAGE = re.compile(r"(?:^|\n)Page \d+: ")
_QUERY_PREFIX = "search query:"
_CACHED_NOTHING = "no search results found"


class Corpus:
    """Documents ranked for a query by BM25.

    score(q, d) = sum_{w in q} ln(1 + (N - n_w + 0.5) / (n_w + 0.5)) * f_wd / (f_wd + k1 (1 - b + b |d| / mean |d|))
    Source: the Lucene variant in Kamphuis et al. (ECIR 2020), as bm25s computes it. Its idf is positive for every
    word, so a corpus of five sentences ranks as sensibly as one of a million.

    Args:
        documents: what a search returns.
        k1: how slowly repeated words stop counting, >= 0.
        b: how much long documents are penalised, in [0, 1].
    """

    _word_id: Callable[[str], int | None]

    def __init__(self, documents: Sequence[str], *, k1: float, b: float) -> None:
        vocabulary: dict[str, int] = {}
        self.documents: Sequence[str] = list(documents)
        token_ids = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in words_of(text)] for text in self.documents
        ]
        self._postings, self._word_id = bm25_postings(token_ids, vocabulary, k1=k1, b=b), vocabulary.get

    @classmethod
    def of_postings(cls, documents: Sequence[str], postings: Postings, word_id: Callable[[str], int | None]) -> Corpus:
        """A corpus whose index exists."""
        corpus = cls.__new__(cls)
        corpus.documents, corpus._postings, corpus._word_id = documents, postings, word_id
        return corpus

    def __len__(self) -> int:
        return len(self.documents)

    def rank(self, query: str, top_k: int) -> list[int]:
        """Positions of the best documents, best first; equal scores keep document order.

        A document that shares no word with the query is never returned.
        """
        # A set of words: saying a word twice does not make it matter twice.
        ids = [self._word_id(word) for word in dict.fromkeys(words_of(query))]
        return self._postings.top([word for word in ids if word is not None], top_k)


def words_of(text: str) -> list[str]:
    """Lower-case words without accents, punctuation dropped."""
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        text = "".join(character for character in decomposed if not unicodedata.combining(character))
    return _WORD.findall(text.casefold())


def read_documents(path: Path, *, text_field: str, title_field: str) -> Iterator[str]:
    """Read documents one by one: ``"title: text"``, or the text alone where there is no title.

    Args:
        path: JSONL with one object per line, or Parquet.
        text_field: name of the text.
        title_field: name of an optional title.

    Raises:
        DataError: the file is missing, a line is not a JSON object with text, or no line is left.
    """
    found = False
    for where, record in _parquet_rows(path) if path.suffix == ".parquet" else _json_lines(path):
        text, title = record.get(text_field), record.get(title_field)
        if not isinstance(text, str):
            raise DataError(
                f"{where}: expected the document under {text_field!r}, found the fields {sorted(record)}; "
                "set text_field"
            )
        found = True
        yield f"{title}: {text}" if title else text
    if not found:
        raise DataError(f"{path}: expected one JSON document per line, found none; give a corpus that is not empty")


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _parse_json(line, where)


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: expected a Parquet file, found: {error}") from error


def read_search_cache(path: Path) -> tuple[dict[str, str], list[str]]:
    """Read recorded web searches: ``{query: "Page 1: ... Page 2: ..."}``.

    Returns:
        The recorded answer by normalised query ("" where the search engine found nothing), and every distinct snippet.

    Raises:
        DataError: the file is missing, not a JSON object of texts, or empty.
    """
    with _open_text(path) as file:
        cache = _parse_json(file.read(), str(path))
    answers: dict[str, str] = {}
    snippets: dict[str, None] = {}
    for query, answer in cache.items():
        if not isinstance(answer, str):
            raise DataError(
                f"{path}: expected texts by query, found {type(answer).__name__} for the query {query!r}; "
                'a search cache is one JSON object {query: "Page 1: ..."}'
            )
        if answer.strip().casefold().rstrip(".") == _CACHED_NOTHING:
            answer = ""
        answers.setdefault(normalise_query(query), answer)
        snippets.update(dict.fromkeys(split_pages(answer)))
    if not snippets:
        raise DataError(f"{path}: expected recorded searches, found none; give a search cache that is not empty")
    return answers, list(snippets)


def split_pages(answer: str) -> list[str]:
    """The snippets of ``"Page 1: ...\\nPage 2: ..."``; a text without page marks is one snippet."""
    return [snippet for page in _PAGE.split(answer) if (snippet := page.strip())]


def join_pages(snippets: Sequence[str]) -> str:
    """``"Page 1: ...\\nPage 2: ..."``."""
    return "\n".join(f"Page {number}: {snippet}" for number, snippet in enumerate(snippets, start=1))


def normalise_query(query: str) -> str:
    """The key of a recorded search: case, spacing, quotes, end marks and a leading "search query:" do not matter."""
    key = " ".join(query.split()).casefold()
    return key.removeprefix(_QUERY_PREFIX).strip(" \"'.?!")


def bm25_postings(token_ids: Sequence[Sequence[int]], vocabulary: dict[str, int], *, k1: float, b: float) -> Postings:
    """The BM25 scores of every word in every document, computed by bm25s.

    Args:
        token_ids: words of each document.
        vocabulary: every word's id.
        k1: see ``Corpus``.
        b: see ``Corpus``.
    """
    if not vocabulary:
        # Without a single word there is nothing to index, and bm25s would divide by the mean length, zero.
        nothing = np.empty(0, dtype=np.float32)
        return Postings(np.empty(0, dtype=np.int32), nothing, np.zeros(1, dtype=np.int64), len(token_ids), nothing)
    # Imported here: a run without search, and every --help, should not pay for it.
    with _hidden("jax"):  # where it is installed bm25s tries it out, and JAX then takes three quarters of the GPU
        import bm25s

    # bm25s sets its logger to DEBUG when imported, and reports every index it builds.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy", csc_backend="numpy")
    index.index((token_ids, vocabulary), create_empty_token=False, show_progress=False)
    scores = index.scores
    return Postings(scores["indices"], scores["data"], scores["indptr"], len(token_ids))


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Imports inside do not find a module that is not imported yet."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def _open_text(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8")
    except OSError as error:
        raise DataError(f"expected a corpus at {path}, found none ({error.strerror}); correct the path") from error


def _parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: expected a JSON object, found text that is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found a {type(value).__name__}")
    return value
