"""Closing tool sessions beside generation: what a session releases may be a process, a container or a connection."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

_Closes = tuple[Callable[[], None], ...]


class Closer:
    """Closes sessions one after the other in a daemon thread, which lives as long as this.

    On a busy machine the thread that generates would lose half a millisecond to each: whoever was waiting for the
    session wakes and takes its place. Waking this thread has its price too, a tenth of a millisecond: better several
    sessions at once.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Closes | None] = queue.SimpleQueue()  # None ends the thread
        self._failures: list[BaseException] = []
        self._started = False
        weakref.finalize(self, self._queue.put, None)

    def submit(self, *closes: Callable[[], None]) -> None:
        """Close some things soon, in their order."""
        if not closes:
            return
        if not self._started:
            self._started = True
            shared = (self._queue, self._failures)  # not self, which would live as long as the thread
            threading.Thread(target=_work, args=shared, daemon=True, name="appo-tool-close").start()
        self._queue.put(closes)

    def wait(self) -> None:
        """Return when everything submitted is closed.

        Raises:
            BaseException: what the first ``close`` raised that did.
        """
        if not self._started:
            return
        done = threading.Event()
        self._queue.put((done.set,))
        done.wait()
        failures, self._failures[:] = list(self._failures), []
        if failures:
            raise failures[0]


def _work(handed_over: queue.SimpleQueue[_Closes | None], failures: list[BaseException]) -> None:
    while (closes := handed_over.get()) is not None:
        for close in closes:
            try:
                close()
            except BaseException as error:  # told by ``wait``
                failures.append(error)
        del close, closes  # while it waits, the thread keeps nothing alive
