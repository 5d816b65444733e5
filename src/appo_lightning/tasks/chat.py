"""Questions in the published format: chat messages with a checkable answer."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from appo_lightning.tasks.files import FileTasks, UnusableRow, references_of
from appo_lightning.types import TaskRow

_logger = logging.getLogger("appo_lightning")
_ROLES = frozenset(("system", "user", "assistant", "tool"))
_KEPT_COLUMNS = ("ability", "data_source", "extra_info")

# Written as "\boxed" without escaping the backslash, the "\b" became a backspace.
_EATEN, _WHOLE = "\x08oxed", "\\boxed"


class ChatTasks(FileTasks):
    """The rows of a file with ``prompt`` (chat messages) and ``reward_model.ground_truth`` (text or list).

    ``ability``, ``data_source`` and ``extra_info`` are kept as metadata. The published files hold a backspace where
    the ``\\b`` of ``\\boxed`` was eaten; it is put back, with one notice per file.

    Args:
        path: a ``.parquet`` or ``.jsonl`` file.
        limit: use at most so many rows, after shuffling; None uses all.
        shuffle_seed: order of the rows; None keeps the order of the file.
        system_prompt: takes the place of each row's system message; "" removes it, None keeps it.

    Raises:
        ConfigurationError: limit is not positive.
        DataError: the file is missing, of an unknown kind or unreadable, lacks a column, or has no usable row.
    """

    required_columns: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt",), ("reward_model",))

    def __init__(
        self,
        path: str,
        *,
        limit: int | None = None,
        shuffle_seed: int | None = None,
        system_prompt: str | None = None,
    ) -> None:
        self.system_prompt = system_prompt
        self._repaired = 0
        super().__init__(path, limit=limit, shuffle_seed=shuffle_seed)
        if self._repaired:
            _logger.warning(
                "%s: put back the backslash of \\boxed, read as a backspace, in the messages of %d rows",
                self._path.name,
                self._repaired,
            )

    def _task(self, record: dict[str, Any], row_id: str) -> TaskRow:
        messages = [
            {"role": message["role"], "content": message["content"].replace(_EATEN, _WHOLE)}
            for message in self._messages(record)
        ]
        reward_model = record.get("reward_model")
        if not isinstance(reward_model, dict):
            raise UnusableRow("no reward_model")
        references = references_of(reward_model.get("ground_truth"))
        metadata = {name: record[name] for name in _KEPT_COLUMNS if record.get(name) is not None}
        return TaskRow(row_id, messages, references, metadata)

    def _inspect(self, record: dict[str, Any], task: TaskRow) -> None:
        self._repaired += any(_EATEN in message["content"] for message in self._messages(record))

    def _messages(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        messages = record.get("prompt")
        if not messages:
            raise UnusableRow("no prompt")
        if not isinstance(messages, list):
            raise UnusableRow(f"a prompt that is no list of chat messages ({messages!r:.40})")
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in _ROLES:
                raise UnusableRow(f"a prompt that is no list of chat messages ({message!r:.40})")
            if not isinstance(message.get("content"), str):
                raise UnusableRow(f"a {message['role']} message without text")
        if not any(message["role"] == "user" and message["content"].strip() for message in messages):
            raise UnusableRow("no question in the prompt")
        if self.system_prompt is None:
            return messages
        others = [message for message in messages if message["role"] != "system"]
        return [{"role": "system", "content": self.system_prompt}, *others] if self.system_prompt else others
