"""A search tool that needs no network: BM25 over a file, or over documents private to the question."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.tools._corpus_index import build_bm25, build_once, facts_of_file, index_name, load_bm25
from appo_lightning.tools.base import StatelessTool, ToolSession
from appo_lightning.tools.corpus import Corpus, join_pages, normalise_query, read_documents, read_search_cache

if TYPE_CHECKING:
    from appo_lightning.types import Task

_REMEMBERED_TASKS = 1024


class SearchTool(StatelessTool):
    """Find the documents that answer a query.

    A task with ``metadata["documents"]`` (a list of texts) searches those and nothing else; every other task searches
    ``corpus``. No match gives an empty result.

    Args:
        corpus: a ``.jsonl`` or ``.parquet`` file with one document per line or row, or a ``.json`` file of recorded web
            searches ``{query: "Page 1: ... Page 2: ..."}``. A recorded query gets its recorded answer, unchanged; any
            other query is ranked over all recorded snippets; ``take_counts`` tells how many were recorded.
        index_dir: directory for the index of a ``.jsonl`` or ``.parquet`` corpus. It is built there once, and again
            after the corpus has changed; all processes of a machine then map the same files. null: each process reads
            the corpus into its memory when a run starts.
        top_k: documents per result. One is shown as it is, several as ``Page 1: ...``, ``Page 2: ...``.
        max_chars: longest text shown of one ranked document, characters.
        k1: BM25, how slowly repeated words stop counting, >= 0.
        b: BM25, how much long documents are penalised, in [0, 1].
        text_field: field that holds the text.
        title_field: field that holds an optional title.

    Raises:
        DataError: the corpus is missing or of an unknown kind; at a session's start also: it cannot be read, or
            neither it nor the task gives anything to search.
    """

    name = "search"
    description = "Finds documents that answer a query."
    text_argument = "query"
    incidental = ("index_dir",)
    _lock: threading.Lock  # around the other private attributes
    _shared: tuple[Corpus, dict[str, str] | None] | None
    _episodes: OrderedDict[str, Corpus]
    _counts: Counter[str]

    def __init__(
        self,
        corpus: str | None = None,
        *,
        top_k: int = 3,
        max_chars: int = 1000,
        k1: float = 1.5,
        b: float = 0.75,
        text_field: str = "text",
        title_field: str = "title",
        index_dir: str | None = None,
    ) -> None:
        if top_k < 1:
            raise ConfigurationError(f"top_k must be at least 1, got {top_k}")
        if max_chars < 1:
            raise ConfigurationError(f"max_chars must be at least 1, got {max_chars}")
        if k1 < 0 or not 0 <= b <= 1:
            raise ConfigurationError(f"k1 must be >= 0 and b in [0, 1], got k1={k1}, b={b}")
        self.corpus = corpus
        self.top_k, self.max_chars = top_k, max_chars
        self.k1, self.b = k1, b
        self.text_field, self.title_field = text_field, title_field
        self.index_dir = index_dir
        if corpus is not None:
            check_corpus_path(Path(corpus))
        if index_dir is not None and (corpus is None or corpus.endswith(".json")):
            raise ConfigurationError(
                f"index_dir has no effect with corpus = {corpus!r}: it is for a .jsonl or .parquet file"
            )
        self._start_empty()

    def open(self, task: Task) -> ToolSession:
        self._corpus_of(task)
        return super().open(task)

    def run(self, argument: str, task: Task) -> str:
        corpus, answers = self._corpus_of(task)
        if answers is not None:
            recorded = answers.get(normalise_query(argument))
            with self._lock:
                self._counts.update(lookups=1, hits=int(recorded is not None))
            if recorded is not None:
                return recorded
        found = [shorten(corpus.documents[row], self.max_chars) for row in corpus.rank(argument, self.top_k)]
        return join_pages(found) if self.top_k > 1 else "".join(found)

    def take_counts(self) -> dict[str, int]:
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def _corpus_of(self, task: Task) -> tuple[Corpus, dict[str, str] | None]:
        """What a task searches, and the recorded answers if it searches recordings."""
        documents = task.metadata.get("documents")
        if documents is not None:
            return self._episode_corpus(task.id, documents), None
        if self.corpus is None:
            raise DataError(
                f'search: expected a corpus or metadata["documents"] in task {task.id!r}, found neither; '
                "set the tool's corpus, or use tasks that bring documents"
            )
        return self._shared_corpus(self.corpus)

    def _shared_corpus(self, corpus: str) -> tuple[Corpus, dict[str, str] | None]:
        # One reader at a time: the other threads wait for the same file anyway.
        with self._lock:
            if self._shared is None:
                self._shared = self._read(Path(corpus))
            return self._shared

    def _read(self, path: Path) -> tuple[Corpus, dict[str, str] | None]:
        if path.suffix == ".json":
            answers, snippets = read_search_cache(path)
            return Corpus(snippets, k1=self.k1, b=self.b), answers
        documents = read_documents(path, text_field=self.text_field, title_field=self.title_field)
        if self.index_dir is None:
            return Corpus(list(documents), k1=self.k1, b=self.b), None
        name = index_name("bm25", *facts_of_file(path), self.k1, self.b, self.text_field, self.title_field)
        directory = Path(self.index_dir) / name
        build_once(directory, lambda place: build_bm25(place, documents, k1=self.k1, b=self.b))
        return load_bm25(directory), None

    def _episode_corpus(self, task_id: str, documents: Any) -> Corpus:
        # Built inside the lock: the trajectories of one task start together and should share one index.
        with self._lock:
            corpus = self._episodes.get(task_id)
            if corpus is None or corpus.documents != list(documents):
                corpus = Corpus(_checked_documents(documents, task_id), k1=self.k1, b=self.b)
                self._episodes[task_id] = corpus
            self._episodes.move_to_end(task_id)
            if len(self._episodes) > _REMEMBERED_TASKS:
                self._episodes.popitem(last=False)
            return corpus

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self._shared = None
        self._episodes = OrderedDict()
        self._counts = Counter()

    def __getstate__(self) -> dict[str, Any]:
        # Copies and worker processes build their own indices; a lock cannot travel.
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_empty()


def check_corpus_path(path: Path) -> None:
    """Refuse what cannot be a corpus."""
    if path.suffix not in (".jsonl", ".parquet", ".json"):
        raise DataError(
            f"corpus must end in .jsonl or .parquet (documents) or .json (recorded searches), got {str(path)!r}"
        )
    if not path.is_file():
        raise DataError(f"expected a corpus at {path}, found no file; correct the path")


def _checked_documents(documents: Any, task_id: str) -> list[str]:
    if not isinstance(documents, list | tuple) or not all(isinstance(text, str) for text in documents):
        raise DataError(f'metadata["documents"] of task {task_id!r} must be a list of texts, got {documents!r:.80}')
    return list(documents)


def shorten(text: str, max_chars: int) -> str:
    """The beginning of a long text, cut between words where that is near."""
    if len(text) <= max_chars:
        return text
    # Cut between words unless the last one is very long.
    head = text[:max_chars]
    return (head[: head.rfind(" ")] if head.rfind(" ") > max_chars // 2 else head) + " …"
