"""Closing tool sessions beside generation: what a session releases may be a process, a container or a connection."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable


class Closer:
    """Closes sessions one after the other in a daemon thread, which lives as long as this.

    On a busy machine the thread that generates would lose half a millisecond to each: whoever was waiting for the
    session wakes and takes its place.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None ends the thread
        self._failures: list[BaseException] = []
        self._started = False
        weakref.finalize(self, self._queue.put, None)

    def submit(self, close: Callable[[], None]) -> None:
        """Close something soon."""
        if not self._started:
            self._started = True
            threading.Thread(
                target=_work, args=(self._queue, self._failures), daemon=True, name="appo-tool-close"
            ).start()
        self._queue.put(close)

    def wait(self) -> None:
        """Return when everything submitted is closed.

        Raises:
            BaseException: what the first ``close`` raised that did.
        """
        if not self._started:
            return
        done = threading.Event()
        self._queue.put(done.set)
        done.wait()
        failures, self._failures[:] = list(self._failures), []
        if failures:
            raise failures[0]


def _work(closes: queue.SimpleQueue[Callable[[], None] | None], failures: list[BaseException]) -> None:
    while (close := closes.get()) is not None:
        try:
            close()
        except BaseException as error:  # told by ``wait``
            failures.append(error)
        del close  # while it waits, the thread keeps nothing alive
