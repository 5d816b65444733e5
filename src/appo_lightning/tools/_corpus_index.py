"""A corpus and its BM25 index as files: built once, mapped into memory, shared by processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import numpy as np
from filelock import FileLock

from appo_lightning.errors import DataError
from appo_lightning.tools._ranking import Postings
from appo_lightning.tools.corpus import Corpus, bm25_postings, words_of

_FORMAT = 1  # of the files; another one is built anew
_DONE = "index.json"  # written last


class TextFile(Sequence[str]):
    """Texts in one file, read where they lie.

    Args:
        directory: holds ``texts.bin`` and ``offsets.npy``.
    """

    def __init__(self, directory: Path) -> None:
        self._offsets = np.asarray(np.load(directory / "offsets.npy", mmap_mode="r"))
        path = directory / "texts.bin"
        empty = path.stat().st_size == 0  # which cannot be mapped
        if len(self._offsets) == 0 or path.stat().st_size != self._offsets[-1]:
            raise ValueError(f"{path.name} does not have the length that offsets.npy tells")
        self._bytes = np.empty(0, np.uint8) if empty else np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        return self._bytes[self._offsets[row] : self._offsets[row + 1]].tobytes().decode("utf-8")


def index_name(*facts: object) -> str:
    """A name that changes with anything that the index was made of."""
    return hashlib.sha256(json.dumps([_FORMAT, *facts]).encode()).hexdigest()[:16]


def facts_of_file(path: Path) -> list[object]:
    """What tells another version of a file from this one."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def build_once(directory: Path, build: Callable[[Path], dict[str, object]]) -> None:
    """Build an index unless it is there; other processes wait for the one that builds.

    Args:
        directory: of the index.
        build: writes the files into the directory that it is given, and tells about them.

    Raises:
        DataError: the directory cannot be written.
    """
    if (directory / _DONE).is_file():
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if (directory / _DONE).is_file():
                return
            unfinished = directory.with_name(f"{directory.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a build that was killed
            unfinished.mkdir()
            told = build(unfinished)
            (unfinished / _DONE).write_text(json.dumps(told, indent=1) + "\n")
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(unfinished, directory)
    except OSError as error:
        raise DataError(f"index_dir: expected a directory to write to, found: {error}; name another one") from error


def write_texts(directory: Path, documents: Iterable[str]) -> Iterable[str]:
    """Write texts for ``TextFile`` while passing them on."""
    offsets = array("q", [0])
    with (directory / "texts.bin").open("wb") as file:
        for document in documents:
            # Half a surrogate pair is legal JSON and no text.
            encoded = document.encode("utf-8", "replace")
            file.write(encoded)
            offsets.append(offsets[-1] + len(encoded))
            yield document
    np.save(directory / "offsets.npy", np.frombuffer(offsets, dtype=np.int64))


def build_bm25(directory: Path, documents: Iterable[str], *, k1: float, b: float) -> dict[str, object]:
    """Write the files of a BM25 index.

    Args:
        directory: empty.
        documents: read once; their words are kept in memory until the index is written.
        k1: of BM25.
        b: of BM25.
    """
    vocabulary: dict[str, int] = {}
    token_ids = [
        array("i", (vocabulary.setdefault(word, len(vocabulary)) for word in words_of(text)))
        for text in write_texts(directory, documents)
    ]
    postings = bm25_postings(token_ids, vocabulary, k1=k1, b=b)
    for name in ("rows", "scores", "starts", "best"):
        np.save(directory / f"{name}.npy", getattr(postings, name))
    hashes = np.fromiter((_hash_of(word) for word in vocabulary), np.uint64, len(vocabulary))
    order = np.argsort(hashes)
    np.save(directory / "word_hashes.npy", hashes[order])
    np.save(directory / "word_ids.npy", order.astype(np.int32))
    return {"documents": len(token_ids), "words": len(vocabulary), "postings": len(postings.rows)}


@contextmanager
def loading(directory: Path) -> Iterator[None]:
    """Around what reads the files of an index.

    Raises:
        DataError: they are not whole.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(
            f"index_dir: expected an index at {directory}, found it damaged ({error}); delete that directory, then it "
            "is built again"
        ) from error


def load_bm25(directory: Path) -> Corpus:
    """The corpus of ``build_bm25``, mapped: its pages are shared with every process that maps it.

    Raises:
        DataError: a file is not whole.
    """
    with loading(directory):
        texts = TextFile(directory)
        rows, scores, starts, best, hashes, ids = (
            np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r"))
            for name in ("rows", "scores", "starts", "best", "word_hashes", "word_ids")
        )

    def word_id(word: str) -> int | None:
        wanted = np.uint64(_hash_of(word))
        place = int(np.searchsorted(hashes, wanted))
        return int(ids[place]) if place < len(hashes) and hashes[place] == wanted else None

    return Corpus.of_postings(texts, Postings(rows, scores, starts, len(texts), best), word_id)


def _hash_of(word: str) -> int:
    """64 bits: among a million words, two that share it are as likely as one in 40 million."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
