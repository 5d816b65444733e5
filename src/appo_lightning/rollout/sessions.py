"""One tool as one trajectory uses it: opened late, brought to the state of its prefix, never used after a time-out."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Sequence

from appo_lightning.errors import AppoError, ToolFailure
from appo_lightning.tools.base import Tool, ToolSession
from appo_lightning.types import Task, ToolCall

# A tool that keeps its own clock answers before it is given up: its message says more.
_GRACE = 1.1


def calls_to_replay(calls: Sequence[ToolCall], name: str) -> list[ToolCall]:
    """The calls that made a tool's state: those answered by its session that was not given up.

    Args:
        calls: of a prefix.
        name: of the tool.
    """
    replay: list[ToolCall] = []
    for call in calls:
        if call.name == name and call.error not in ("limit", "malformed"):
            replay = [] if call.error == "timeout" else [*replay, call]
    return replay


def digest_of(answer: str | Exception, state: str = "") -> str:
    """What a call answered or failed with, short; "" for a time-out, which says nothing about the tool's state.

    Args:
        answer: what the policy reads.
        state: ``ToolSession.state_digest`` behind the call.
    """
    if isinstance(answer, ToolFailure) and answer.kind == "timeout":
        return ""
    text = answer if isinstance(answer, str) else f"{type(answer).__name__}: {answer}"
    if state:
        text = f"{text}\0{state}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class EpisodeSession:
    """A tool session that one trajectory owns.

    ``call`` runs in a tool thread, one at a time; the other methods are for any thread. A session given up while it
    works is closed by the thread that works, as soon as that returns: calls and ``close`` never overlap.

    Args:
        tool: to open.
        task: of the trajectory.
        replay: calls to repeat before the first call, so that the session has the state that they left.

    Attributes:
        digest: of the last answer, and of what the session remembered behind it.
        state_matches: whether the repeated calls answered as they did at first and left the same behind; None: none was
            repeated.
    """

    def __init__(self, tool: Tool, task: Task, replay: Sequence[ToolCall] = ()) -> None:
        self._tool, self._task, self._replay = tool, task, list(replay)
        self._session: ToolSession | None = None
        self._lock = threading.Lock()
        self._busy = self._closing = False
        self.digest = ""
        self.state_matches: bool | None = None

    @property
    def timeout_s(self) -> float:
        """Wall-clock limit of the next call; each call repeated before it has the same limit."""
        return _GRACE * self._tool.timeout_s * (1 + len(self._replay))

    def call(self, argument: str) -> str:
        """Answer a call.

        Raises:
            ToolFailure: the tool's, or the state of the prefix could not be restored.
        """
        with self._lock:
            self._busy = True
        self.digest = ""
        try:
            answer = self._opened().call(argument)
            self.digest = digest_of(answer, self._state())
            return answer
        except Exception as error:
            self.digest = digest_of(error, self._state())
            raise
        finally:
            with self._lock:
                self._busy = False
                closing = self._closing
            if closing:
                self._close_session()

    def interrupt(self) -> None:
        """Give the session up; a running call should return soon."""
        with self._lock:
            self._closing = True
            session = self._session
        if session is not None:
            session.interrupt()

    def close(self) -> None:
        """Close the session; it cannot be called again."""
        with self._lock:
            self._closing = True
            busy = self._busy
        if not busy:
            self._close_session()

    def _opened(self) -> ToolSession:
        self._check_wanted()
        if self._session is None:
            self._session = self._tool.open(self._task)
        while self._replay:
            self._check_wanted()
            self._repeat(self._session, self._replay[0])
            del self._replay[0]
        self._check_wanted()
        return self._session

    def _repeat(self, session: ToolSession, recorded: ToolCall) -> None:
        try:
            self._compare(recorded, session.call(recorded.argument))
        except AppoError:
            raise
        except Exception as error:
            timed_out = isinstance(error, ToolFailure) and error.kind == "timeout"
            # A call that failed in the root fails here too, and leaves the same state behind.
            if recorded.error == "error" and not timed_out:
                self._compare(recorded, error)
                return
            if not timed_out:
                self._mark(matches=False)
            # Kind "timeout": this session's state is not the root's, so it is given up.
            raise ToolFailure(f"the state of earlier calls is lost: {error}", kind="timeout") from error

    def _compare(self, recorded: ToolCall, answer: str | Exception) -> None:
        if not recorded.digest:
            return
        self._mark(matches=digest_of(answer, self._state()) == recorded.digest)

    def _mark(self, *, matches: bool) -> None:
        self.state_matches = matches and self.state_matches is not False
        if not matches:
            warnings.warn(
                f"tool {self._tool.name!r}: a call repeated for a branch did not do what it did in its root (time, "
                "chance, addresses?): the branch may start from another state; tools/replay_mismatch_rate counts such "
                "branches",
                stacklevel=2,
            )

    def _state(self) -> str:
        with self._lock:
            return "" if self._session is None else self._session.state_digest

    def _check_wanted(self) -> None:
        if self._closing:
            raise ToolFailure("given up", kind="timeout")

    def _close_session(self) -> None:
        with self._lock:
            session, self._session = self._session, None
        if session is None:
            return
        try:
            session.close()
        except Exception as error:  # the trajectory is complete without it
            warnings.warn(f"closing a session of tool {self._tool.name!r} failed: {error!r}", stacklevel=2)
