"""Answers that survive the run and are shared by processes, and a rate limit that they keep together."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appo_lightning.errors import DataError

_BUSY_S = 30.0  # writers of other processes are waited for

_TABLES = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, query TEXT NOT NULL, answer TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS rates (provider TEXT PRIMARY KEY, free_at REAL NOT NULL);
"""


class AnswerStore:
    """A SQLite file in write-ahead mode: any number of threads and processes of one machine.

    Args:
        path: the file; made if it is missing.

    Raises:
        DataError: the file cannot be opened, or is no database.
    """

    def __init__(self, path: str) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            # Threads take turns under the lock.
            self._database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise DataError(f"expected a cache of answers at {path}, found: {error}; name another file") from error

    def get(self, key: str) -> Any | None:
        """The answer under a key, None without one."""
        with self._database_of_one_thread():
            row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, query: str, answer: Any) -> Any:
        """Keep an answer, unless another process was first; the kept answer."""
        # A policy may write half a surrogate pair, which is no text for SQLite.
        row = (key, query.encode("utf-8", "replace").decode(), json.dumps(answer), time.time())
        with self._transaction():
            self._database.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", row)
            kept = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return json.loads(kept[0])

    def reserve(self, provider: str, interval_s: float, patience_s: float) -> float | None:
        """Take the next place in the line for a provider that all processes share.

        Returns:
            Seconds to wait for it; None, and no place, if that is more than ``patience_s``.
        """
        with self._transaction():
            now = time.time()
            row = self._database.execute("SELECT free_at FROM rates WHERE provider = ?", (provider,)).fetchone()
            # A clock that was set back must not close the line for hours.
            free_at = min(max(now, row[0]), now + 3600.0) if row else now
            if free_at - now > patience_s:
                return None
            self._database.execute("INSERT OR REPLACE INTO rates VALUES (?, ?)", (provider, free_at + interval_s))
        return free_at - now

    def __len__(self) -> int:
        with self._database_of_one_thread():
            return self._database.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        with self._lock:
            self._database.close()

    @contextlib.contextmanager
    def _database_of_one_thread(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise DataError(
                    f"the cache of answers at {self._path} cannot be used: {error}; make room, or name another file"
                ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._database_of_one_thread():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")
