"""Search by meaning: an encoder's vectors of queries and documents, compared exactly."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.tools._corpus_index import TextFile, build_once, facts_of_file, index_name, loading, write_texts
from appo_lightning.tools.base import StatelessTool, ToolSession, check_tool_name
from appo_lightning.tools.corpus import join_pages, read_documents
from appo_lightning.tools.search import check_corpus_path, shorten

if TYPE_CHECKING:
    import torch

    from appo_lightning.types import Task

_BLOCK = 65_536  # documents compared at a time


class DenseSearchTool(StatelessTool):
    """Find the documents whose vectors are nearest to the query's, by exact inner product.

    An encoder gives one vector per text; it runs on the CPU. The vectors of the corpus are computed once, which takes
    long for a large one, and kept in ``index_dir``; all processes of a machine map the same file.

    Args:
        corpus: a ``.jsonl`` or ``.parquet`` file with one document per line or row.
        encoder: directory or Hub id of a transformers encoder.
        index_dir: directory for the vectors and texts.
        pooling: one vector from those of the tokens: their "mean", the first ("cls") or the last ("last").
        normalise: scale vectors to length 1, so that products are cosines.
        query_prefix: put before every query, as the encoder's card says ("query: ").
        document_prefix: put before every document ("passage: ").
        max_tokens: of a text; the rest is not seen.
        batch_size: documents encoded at a time.
        top_k: documents per result. One is shown as it is, several as ``Page 1: ...``, ``Page 2: ...``.
        max_chars: longest text shown of one document, characters.
        text_field: field that holds the text.
        title_field: field that holds an optional title.
        timeout_s: wall-clock limit of one call, seconds.
        name: the tag.

    Raises:
        DataError: the corpus is missing or of an unknown kind; at a session's start also: it cannot be read.
        ConfigurationError: an option is out of range; at a session's start also: the encoder cannot be loaded.
    """

    description = "Finds documents that answer a query."
    text_argument = "query"
    incidental = ("index_dir",)
    _index: tuple[TextFile, NDArray[np.float32]] | None
    _encoder: _Encoder | None

    def __init__(
        self,
        corpus: str,
        encoder: str,
        index_dir: str,
        *,
        pooling: Literal["mean", "cls", "last"] = "mean",
        normalise: bool = True,
        query_prefix: str = "",
        document_prefix: str = "",
        max_tokens: int = 512,
        batch_size: int = 32,
        top_k: int = 3,
        max_chars: int = 1000,
        text_field: str = "text",
        title_field: str = "title",
        timeout_s: float = 30.0,
        name: str = "search",
    ) -> None:
        for option, value in (
            ("max_tokens", max_tokens),
            ("batch_size", batch_size),
            ("top_k", top_k),
            ("max_chars", max_chars),
        ):
            if value < 1:
                raise ConfigurationError(f"{option} must be at least 1, got {value}")
        if not timeout_s > 0:
            raise ConfigurationError(f"timeout_s must be a positive number of seconds, got {timeout_s}")
        path = Path(corpus)
        check_corpus_path(path)
        if path.suffix == ".json":
            raise DataError(f"corpus must be a .jsonl or .parquet file, got {corpus!r}")
        self.corpus, self.encoder, self.index_dir = corpus, encoder, index_dir
        self.pooling, self.normalise = pooling, normalise
        self.query_prefix, self.document_prefix = query_prefix, document_prefix
        self.max_tokens, self.batch_size = max_tokens, batch_size
        self.top_k, self.max_chars = top_k, max_chars
        self.text_field, self.title_field = text_field, title_field
        self.timeout_s, self.name = timeout_s, check_tool_name(name)
        self._start_empty()

    def open(self, task: Task) -> ToolSession:
        self._opened()
        return super().open(task)

    def run(self, argument: str, task: Task) -> str:
        if not argument.strip():
            return ""
        encoder, (texts, vectors) = self._opened()
        query = encoder.vectors([self.query_prefix + argument])[0]
        found = [shorten(texts[row], self.max_chars) for row in nearest(vectors, query, self.top_k)]
        return join_pages(found) if self.top_k > 1 else "".join(found)

    def _opened(self) -> tuple[_Encoder, tuple[TextFile, NDArray[np.float32]]]:
        with self._lock:
            if self._encoder is None:
                self._encoder = _Encoder(
                    self.encoder, pooling=self.pooling, normalise=self.normalise, max_tokens=self.max_tokens
                )
            if self._index is None:
                self._index = self._build_or_load(self._encoder)
            return self._encoder, self._index

    def _build_or_load(self, encoder: _Encoder) -> tuple[TextFile, NDArray[np.float32]]:
        path = Path(self.corpus)
        name = index_name(
            *("dense", *facts_of_file(path), *_facts_of_encoder(self.encoder), self.pooling, self.normalise),
            *(self.document_prefix, self.max_tokens, self.text_field, self.title_field),
        )
        directory = Path(self.index_dir) / name

        def build(place: Path) -> dict[str, object]:
            documents = read_documents(path, text_field=self.text_field, title_field=self.title_field)
            texts = (self.document_prefix + text for text in write_texts(place, documents))
            return _write_vectors(place, encoder, texts, self.batch_size)

        build_once(directory, build)
        with loading(directory):
            return TextFile(directory), np.asarray(np.load(directory / "vectors.npy", mmap_mode="r"))

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self._index, self._encoder = None, None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and worker processes load the encoder themselves.
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_empty()


def nearest(vectors: NDArray[np.float32], query: NDArray[np.float32], count: int) -> list[int]:
    """Rows with the largest inner products, best first; equal ones in order.

    Args:
        vectors: [N, D].
        query: [D].
        count: of rows.
    """
    rows, products = np.empty(0, np.int64), np.empty(0, np.float32)
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK] @ query
        rows = np.concatenate([rows, np.arange(start, start + len(block))])
        products = np.concatenate([products, block])
        best = np.argsort(-products, kind="stable")[:count]
        rows, products = rows[best], products[best]
    return rows.tolist()


class _Encoder:
    """A transformers encoder on the CPU; one text batch at a time, whoever asks."""

    def __init__(self, path: str, *, pooling: str, normalise: bool, max_tokens: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            self._model = AutoModel.from_pretrained(path).eval()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigurationError(
                f"encoder: expected a transformers encoder at {path!r}, found: {reason}"
            ) from error
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._pooling, self._normalise, self._max_tokens = pooling, normalise, max_tokens
        self._lock = threading.Lock()

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[B, D] one vector per text."""
        import torch

        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        with self._lock, torch.no_grad():
            inputs = self._tokenizer(
                clean, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            )
            states = self._model(**inputs).last_hidden_state.float()
            pooled = self._pooled(states, inputs["attention_mask"])
            if self._normalise:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return pooled.numpy()

    def _pooled(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self._pooling == "cls":
            return states[:, 0]
        if self._pooling == "last":
            return states[range(len(states)), mask.sum(dim=1) - 1]
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _write_vectors(place: Path, encoder: _Encoder, texts: Iterable[str], batch_size: int) -> dict[str, object]:
    """Write [N, D] float32 without holding them all in memory."""
    remaining, count, width = iter(texts), 0, 0
    with (place / "vectors.bin").open("wb") as file:
        for batch in _batches(remaining, batch_size):
            vectors = encoder.vectors(batch)
            file.write(np.ascontiguousarray(vectors).tobytes())
            count, width = count + len(vectors), vectors.shape[1]
    # The same numbers with a header: only now is their shape known.
    raw = np.memmap(place / "vectors.bin", dtype=np.float32, mode="r", shape=(count, width))
    np.save(place / "vectors.npy", raw)
    (place / "vectors.bin").unlink()
    return {"documents": count, "width": width}


def _batches(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, size)):
        yield batch


def _facts_of_encoder(path: str) -> list[object]:
    """Its name, and of a directory what tells other weights from these."""
    weights = sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")])
    return [path, *(fact for file in weights for fact in facts_of_file(file))]
