"""Answers in a file of JSON lines, which a person can read and version control can compare."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from appo_lightning.errors import DataError

_BEGIN = b'{"key": "'  # of every line


class TextStore:
    """One answer per line, all of them in memory; any number of threads and processes of one machine add to it.

    Args:
        path: the file; made at the first answer.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """

    def __init__(self, path: str) -> None:
        self._path, self._lock = Path(path), threading.Lock()
        self._answers: dict[str, Any] = {}
        self._read, self._lines = 0, 0  # bytes, lines
        with self._own_errors():
            if self._path.exists():
                self._read_on()

    def get(self, key: str) -> Any | None:
        """The answer under a key, None without one."""
        with self._lock, self._own_errors():
            if key not in self._answers and self._path.exists():
                self._read_on()
            return self._answers.get(key)

    def put(self, key: str, query: str, answer: Any) -> Any:
        """Keep an answer, unless another process was first; the kept answer."""
        row = json.dumps({"key": key, "query": query, "answer": answer})
        with self._lock, self._own_errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                self._read_on()
                if key not in self._answers:
                    self._remove_half_line(file)
                    file.write(row.encode() + b"\n")
                    file.flush()
                    self._read_on()
            return self._answers[key]

    def __len__(self) -> int:
        with self._lock:
            return len(self._answers)

    def close(self) -> None:
        """Nothing is open between calls."""

    def _remove_half_line(self, file: IO[bytes]) -> None:
        """Take away what a process left that was killed while it wrote, and nothing else."""
        size = os.path.getsize(self._path)
        if size > self._read:
            with open(self._path, "rb") as again:
                again.seek(self._read)
                rest = again.read(40)
            if not (rest.startswith(_BEGIN) or _BEGIN.startswith(rest)):
                raise self._not_ours(self._lines + 1, rest)
            file.truncate(self._read)

    def _not_ours(self, number: int, line: bytes) -> DataError:
        return DataError(
            f'{self._path}:{number}: expected {{"key": ..., "query": ..., "answer": ...}}, found {line[:40]!r}; name '
            "another file"
        )

    def _read_on(self) -> None:
        """Read what was added since the last time; a line counts when it is whole."""
        if os.path.getsize(self._path) == self._read:
            return
        with open(self._path, "rb") as file:
            file.seek(self._read)
            for line in _whole_lines(file):
                self._lines += 1
                try:
                    row = json.loads(line)
                    self._answers.setdefault(row["key"], row["answer"])
                except (ValueError, KeyError, TypeError) as error:
                    raise self._not_ours(self._lines, line) from error
                self._read += len(line)

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"expected recorded answers at {self._path}, found: {error.strerror}; name another file"
            ) from error


def _whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    return (line for line in file if line.endswith(b"\n"))
