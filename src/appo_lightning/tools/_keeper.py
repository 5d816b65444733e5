"""What tools with a store of answers have in common."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, Generic, Protocol, TypeVar


class Store(Protocol):
    """Answers by key; what was kept first holds."""

    def get(self, key: str) -> Any | None: ...

    def put(self, key: str, query: str, answer: Any) -> Any: ...

    def close(self) -> None: ...


AnyStore = TypeVar("AnyStore", bound=Store)


class KeepsAnswers(ABC, Generic[AnyStore]):
    """A tool with a store that is opened when it is first needed, by each copy and process for itself.

    Whatever is no option belongs in private attributes, which copies do not take over: ``_start_empty`` makes them.
    """

    _lock: threading.Lock  # around private attributes
    _counts: Counter[str]
    _store: AnyStore | None

    @abstractmethod
    def _open_store(self) -> AnyStore:
        """Open the store.

        Raises:
            DataError: it cannot be opened.
        """

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self._counts, self._store = Counter(), None

    def _opened_store(self) -> AnyStore:
        with self._lock:
            if self._store is None:
                self._store = self._open_store()
            return self._store

    def _count(self, **events: int) -> None:
        with self._lock:
            self._counts.update(events)

    def take_counts(self) -> dict[str, int]:
        """See ``Tool``."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def close(self) -> None:
        """See ``Tool``."""
        with self._lock:
            store, self._store = self._store, None
        if store is not None:
            store.close()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_empty()
