"""Record what a tool answers, and replay it without the tool."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from appo_lightning.errors import AppoError, ConfigurationError, DataError, ToolBroken, ToolFailure
from appo_lightning.tools._store import AnswerStore
from appo_lightning.tools.base import Tool, ToolSession

if TYPE_CHECKING:
    from appo_lightning.types import Task


_NO_OPTIONS = ("timeout_s", "description", "parameters", "text_argument")  # some are known only when a server runs
_GRACE = 1.05  # a tool that keeps its own time says more; the loop waits a little longer still
_DEEPEST = 8  # nesting of options that is looked into


class CassetteTool(Tool):
    """Another tool with its answers on record, so that a run can be repeated without it, token by token.

    An answer is found again by its content: the tool's class and options (its public attributes, but for its time limit
    and description), the task's id and metadata, the argument, and for a stateful tool every earlier argument of the
    session. Failures and time-outs are
    on record, too. Where the same call is answered twice while recording, the first answer holds for both.

    Args:
        tool: the recorded one.
        path: SQLite file, on a local disk; several tools and processes may share it.
        mode: "record" answers from the file what it holds, and asks the tool for the rest; "replay" never touches the
            tool, and stops the run at a call that is not on record.

    Raises:
        ConfigurationError: a cassette in a cassette.
        DataError: at a session's start: the file cannot be opened, or is missing in replay mode.
    """

    _counts: Counter[str]
    _store: AnswerStore | None

    def __init__(self, tool: Tool, path: str, mode: Literal["record", "replay"] = "record") -> None:
        if isinstance(tool, CassetteTool):
            raise ConfigurationError("a cassette in a cassette has no effect; wrap the tool itself")
        self.tool, self.path, self.mode = tool, path, mode
        self.name, self.description, self.parameters = tool.name, tool.description, tool.parameters
        self.timeout_s, self.stateful, self.text_argument = tool.timeout_s, tool.stateful, tool.text_argument
        self._start_empty()

    def prepare(self) -> None:
        before = self._facts()
        key = hashlib.sha256(json.dumps([self._fingerprint(), "facts"], sort_keys=True).encode()).hexdigest()
        if self.mode == "record":
            self.tool.prepare()
            self._describe()
            if self._facts() != before:  # replay has no server to ask
                self._opened_store().put(key, "facts", self._facts())
        elif (facts := self._opened_store().get(key)) is not None:
            self.description, self.parameters, self.text_argument = facts

    def open(self, task: Task) -> ToolSession:
        store = self._opened_store()
        inner = None
        if self.mode == "record":
            inner = self.tool.open(task)
            self._describe()
        return _CassetteSession(self, store, inner, [self._fingerprint(), task.id, _plain(task.metadata)])

    def _facts(self) -> list[Any]:
        return [self.description, self.parameters, self.text_argument]

    def _describe(self) -> None:
        # Some tools know these only when their server runs.
        self.description, self.parameters = self.tool.description, self.tool.parameters
        self.text_argument = self.tool.text_argument

    def take_counts(self) -> dict[str, int]:
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def close(self) -> None:
        with self._lock:
            store, self._store = self._store, None
        if store is not None:
            store.close()
        self.tool.close()

    def _fingerprint(self) -> list[Any]:
        options = {key: value for key, value in vars(self.tool).items() if key not in _NO_OPTIONS}
        return [_kind_of(self.tool), _plain(options)]

    def _opened_store(self) -> AnswerStore:
        with self._lock:
            if self._store is None:
                if self.mode == "replay" and not Path(self.path).is_file():
                    raise DataError(
                        f"replay: expected recorded calls of {self.name!r} at {self.path}, found no file; record first"
                    )
                self._store = AnswerStore(self.path)
            return self._store

    def _count(self, *, hit: bool) -> None:
        with self._lock:
            self._counts.update(lookups=1, hits=int(hit))

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self._counts, self._store = Counter(), None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and worker processes open the file themselves.
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_empty()


class _CassetteSession(ToolSession):
    def __init__(self, cassette: CassetteTool, store: AnswerStore, inner: ToolSession | None, context: list) -> None:
        self._cassette, self._store, self._inner = cassette, store, inner
        self._context = hashlib.sha256(json.dumps(context, sort_keys=True).encode()).hexdigest()
        self._history: list[str] = []  # arguments so far; of a stateful tool
        self._done = 0  # of these, how many the inner session has seen
        self._thread: threading.Thread | None = None  # of the last call

    def call(self, argument: str) -> str:
        said = json.dumps([self._context, self._history, argument])
        key = hashlib.sha256(said.encode()).hexdigest()
        answer = self._store.get(key)
        self._cassette._count(hit=answer is not None)
        if answer is None:
            # What the file holds is what every later run will read: so it is what this one reads.
            answer = self._store.put(key, argument, self._asked(argument))
        if self._cassette.stateful:
            self._history.append(argument)
        text, failure = answer
        if failure is not None:
            raise ToolFailure(text, failure)
        return text

    def interrupt(self) -> None:
        if self._inner is not None:
            self._inner.interrupt()

    def close(self) -> None:
        inner, self._inner = self._inner, None
        if inner is None:
            return
        thread = self._thread
        if thread is None or not thread.is_alive():
            inner.close()
            return

        def close_afterwards() -> None:
            thread.join()
            inner.close()

        # A call that was given up still runs: closing must not overlap it.
        threading.Thread(target=close_afterwards, daemon=True, name="appo-cassette").start()

    def _asked(self, argument: str) -> list[str | None]:
        """The tool's answer as text and kind of failure."""
        if self._inner is None:
            raise ToolBroken(
                f"replay: {self._cassette.path} holds no answer of {self._cassette.name!r} to {argument!r:.80} here; "
                "the tool's options, the task or an earlier call differ from those recorded: record again"
            )
        # Calls that were answered from the file: the tool has to catch up with them.
        for earlier in self._history[self._done :]:
            self._timed(self._inner, earlier)
        answer = self._timed(self._inner, argument)
        self._done = len(self._history) + 1
        return answer

    def _timed(self, inner: ToolSession, argument: str) -> list[str | None]:
        """One call within the tool's time, which is kept here: the loop's own would leave no record."""
        answers: list[list[str | None] | BaseException] = []

        def call() -> None:
            try:
                answers.append([inner.call(argument), None])
            except ToolFailure as failure:
                answers.append([str(failure), failure.kind])
            except AppoError as error:
                answers.append(error)
            except BaseException as error:  # as the loop does: the policy reads it
                answers.append([f"{type(error).__name__}: {error}", "error"])

        self._thread = threading.Thread(target=call, daemon=True, name="appo-cassette")
        self._thread.start()
        self._thread.join(_GRACE * self._cassette.timeout_s)
        if not answers:
            inner.interrupt()
            return [f"no answer within {self._cassette.timeout_s:g} seconds", "timeout"]
        if isinstance(answers[0], BaseException):
            raise answers[0]
        return answers[0]


def _plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON that is the same in every process: no representation that holds an address."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if depth == _DEEPEST:
        return _kind_of(value)
    if isinstance(value, dict):
        return {str(key): _plain(inner, depth + 1) for key, inner in value.items() if not str(key).startswith("_")}
    if isinstance(value, list | tuple):
        return [_plain(inner, depth + 1) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_plain(inner, depth + 1)) for inner in value)
    if inspect.isroutine(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return [_kind_of(value), _plain(getattr(value, "__dict__", {}), depth + 1)]


def _kind_of(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
