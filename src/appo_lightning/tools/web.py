"""Web search through any HTTP provider: polite, bounded in time, and remembered."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appo_lightning.errors import ConfigurationError, DataError, ToolBroken, ToolFailure
from appo_lightning.tools._http import keep_keys_out_of_logs
from appo_lightning.tools._keeper import KeepsAnswers
from appo_lightning.tools._provider import SearchProvider
from appo_lightning.tools._store import AnswerStore
from appo_lightning.tools.base import StatelessTool, ToolSession, check_tool_name
from appo_lightning.tools.corpus import join_pages, normalise_query
from appo_lightning.tools.search import shorten

if TYPE_CHECKING:
    import httpx2

    from appo_lightning.types import Task

_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_JITTER = random.Random()  # of its own: the run's random numbers do not depend on a provider's moods
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0


@dataclass(frozen=True)
class _Problem:
    """Why a request gave no results."""

    reason: str
    wait_s: float = 0.0  # the provider wants to be left alone for so long
    passing: bool = True  # worth another attempt
    timed_out: bool = False


class WebSearchTool(KeepsAnswers[AnswerStore], StatelessTool):
    """Search the web through an HTTP provider, or the answers that it gave before.

    Every answer is kept in ``cache``, which processes of one machine share: the same query is sent once. Failed
    requests are sent again after growing, randomised delays, and not before the provider's ``Retry-After``.

    Args:
        provider: how to ask, and how to read the answer.
        cache: SQLite file of the answers, on a local disk.
        offline: answer from the cache alone; any other query fails, no key is needed.
        top_k: results shown, and asked for where the provider takes ``{count}``.
        max_chars: longest text shown of one result, characters.
        requests_per_second: limit over all processes that share the cache; null: none.
        timeout_s: wall-clock limit of one call, waiting and retries included, seconds.
        request_timeout_s: limit of one request, seconds.
        max_attempts: requests per call.
        give_up_after_s: seconds in which calls fail and none succeeds before the run stops.
        name: the tag.

    Raises:
        ConfigurationError: an option is out of range; at a session's start also: the key's variable is not set.
        DataError: the cache cannot be opened, or is missing in offline mode.
    """

    description = "Searches the web."
    text_argument = "query"
    incidental = ("cache", "offline", "requests_per_second", "request_timeout_s", "max_attempts", "give_up_after_s")
    _failing_since: float | None
    _quiet_until: float
    _client: httpx2.Client | None

    def __init__(
        self,
        provider: SearchProvider,
        cache: str,
        *,
        offline: bool = False,
        top_k: int = 5,
        max_chars: int = 1000,
        requests_per_second: float | None = None,
        timeout_s: float = 60.0,
        request_timeout_s: float = 15.0,
        max_attempts: int = 5,
        give_up_after_s: float = 600.0,
        name: str = "search",
    ) -> None:
        for option, value in (("top_k", top_k), ("max_chars", max_chars), ("max_attempts", max_attempts)):
            if value < 1:
                raise ConfigurationError(f"{option} must be at least 1, got {value}")
        for option, number in (
            ("requests_per_second", requests_per_second),
            ("timeout_s", timeout_s),
            ("request_timeout_s", request_timeout_s),
            ("give_up_after_s", give_up_after_s),
        ):
            if number is not None and not number > 0:
                raise ConfigurationError(f"{option} must be positive, got {number}")
        self.name = check_tool_name(name)
        self.provider, self.cache, self.offline = provider, cache, offline
        self.top_k, self.max_chars = top_k, max_chars
        self.requests_per_second = requests_per_second
        self.timeout_s, self.request_timeout_s = timeout_s, request_timeout_s
        self.max_attempts, self.give_up_after_s = max_attempts, give_up_after_s
        self._start_empty()

    def open(self, task: Task) -> ToolSession:
        # Here, so that a missing key or file stops the run before it begins.
        self._opened_store()
        if not self.offline:
            self.provider.secret()
        return super().open(task)

    def run(self, argument: str, task: Task) -> str:
        deadline = time.monotonic() + self.timeout_s
        query = " ".join(argument.split()).encode("utf-8", "replace").decode()
        if not query:
            return ""
        store, key = self._opened_store(), self._key_of(query)
        # The roots of a prompt like to ask the same: one asks, the others wait for its answer.
        lock = self._lock_of(key)
        if not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise ToolFailure("another call that waits for the same answer took too long", "timeout")
        try:
            found = store.get(key)
            self._count(lookups=1, hits=int(found is not None), retries=0)
            if found is None:
                found = store.put(key, query, self._ask(query, deadline))
        finally:
            lock.release()
        shown = [
            shorten(f"{title}: {text}" if title and text else title or text, self.max_chars) for title, text in found
        ]
        return join_pages(shown[: self.top_k])

    def close(self) -> None:
        super().close()
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # --- the provider ------------------------------------------------------------------------------------------------

    def _ask(self, query: str, deadline: float) -> list[list[str]]:
        """Results from the provider, after as many attempts as it takes and the limits allow."""
        if self.offline:
            raise ToolFailure(f"no recorded answer for {query!r:.200}")
        delay, attempt = _FIRST_DELAY_S, 1
        while isinstance(outcome := self._attempt(query, deadline), _Problem):
            pause = max(outcome.wait_s, delay * _JITTER.uniform(0.5, 1.0))
            if not outcome.passing or attempt == self.max_attempts or time.monotonic() + pause > deadline:
                raise self._failure(outcome)
            self._count(retries=1)
            time.sleep(pause)
            delay, attempt = min(2 * delay, _LONGEST_DELAY_S), attempt + 1
        with self._lock:
            self._failing_since = None
        return outcome

    def _failure(self, last: _Problem) -> ToolFailure | ToolBroken:
        now = time.monotonic()
        with self._lock:
            if self._failing_since is None:
                self._failing_since = now
            failing_s = now - self._failing_since
        if failing_s > self.give_up_after_s:
            return ToolBroken(f"{self.name}: no search has succeeded for {failing_s:.0f} s, the last: {last.reason}")
        return ToolFailure(f"the search failed: {last.reason}", "timeout" if last.timed_out else "error")

    def _attempt(self, query: str, deadline: float) -> list[list[str]] | _Problem:
        """One request."""
        import httpx2

        if problem := self._wait_for_turn(deadline):
            return problem
        limit = max(0.001, min(self.request_timeout_s, deadline - time.monotonic()))
        try:
            response = self._opened_client().request(**self.provider.request(query, self.top_k), timeout=limit)
        except httpx2.TimeoutException:
            return _Problem(f"no answer within {limit:.3g} s", timed_out=True)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            # Only its kind: its text may hold a header or an address, and so the key.
            return _Problem(f"no connection ({type(error).__name__})")
        status = response.status_code
        if status in _TRY_AGAIN:
            wait_s = _retry_after(response.headers.get("Retry-After"))
            with self._lock:
                self._quiet_until = max(self._quiet_until, time.monotonic() + wait_s)
            return _Problem(f"the provider answered {status}", wait_s=wait_s)
        if status in (401, 403):
            key = self.provider.key
            remedy = (
                f"check the key in the environment variable {key}" if key else "it may want a key: set provider.key"
            )
            raise ToolBroken(f"{self.name}: expected access to the provider, found status {status}; {remedy}")
        if status != 200:
            return _Problem(f"the provider answered {status}", passing=False)
        try:
            return self._read(response.json())
        except ValueError:
            return _Problem("the provider's answer is not JSON")

    def _read(self, answer: Any) -> list[list[str]]:
        found = self.provider.read(answer)
        if found is None:
            # Some leave the list out where nothing was found; so does everyone who is asked with a wrong path.
            names = sorted(answer) if isinstance(answer, dict) else type(answer).__name__
            warnings.warn(
                f"{self.name}: no list at {self.provider.results!r} in an answer, taken for no results; "
                f"it has {names!s:.200}",
                stacklevel=2,
            )
        secret = self.provider.secret()
        if secret:  # some providers repeat the request in their answer
            found = [[text.replace(secret, "***") for text in result] for result in found or []]
        return found or []

    def _wait_for_turn(self, deadline: float) -> _Problem | None:
        """Wait for the provider's Retry-After, whichever call was told it, and for the rate limit."""
        quiet_s = self._quiet_until - time.monotonic()
        if quiet_s > 0:
            if time.monotonic() + quiet_s > deadline:
                return _Problem(f"the provider wants no requests for {quiet_s:.0f} s", passing=False)
            time.sleep(quiet_s)
        if self.requests_per_second is None:
            return None
        wait = self._opened_store().reserve(
            self.provider.fingerprint, 1 / self.requests_per_second, deadline - time.monotonic()
        )
        if wait is None:
            # No sign of a provider in trouble: it does not count as one.
            raise ToolFailure("too many searches are waiting for the rate limit", "timeout")
        time.sleep(wait)
        return None

    # --- shared resources --------------------------------------------------------------------------------------------

    def _key_of(self, query: str) -> str:
        said = json.dumps([self.provider.fingerprint, normalise_query(query), self.top_k])
        return hashlib.sha256(said.encode()).hexdigest()

    def _lock_of(self, key: str) -> threading.Lock:
        # A fixed number of locks: two queries that share one only wait for each other.
        return self._query_locks[int(key[:8], 16) % len(self._query_locks)]

    def _open_store(self) -> AnswerStore:
        if self.offline and not Path(self.cache).is_file():
            raise DataError(f"offline: expected recorded answers at {self.cache}, found no file; record first")
        return AnswerStore(self.cache)

    def _opened_client(self) -> httpx2.Client:
        import httpx2

        with self._lock:
            if self._client is None:
                keep_keys_out_of_logs()
                self._client = httpx2.Client(limits=httpx2.Limits(max_connections=100))
            return self._client

    def _start_empty(self) -> None:
        super()._start_empty()
        self._query_locks = [threading.Lock() for _ in range(256)]
        self._failing_since = None
        self._quiet_until = 0.0
        self._client = None


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header: a number or a date; 0 without one."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
