"""Questions in files: one record per row, read row by row, whatever the record says."""

from __future__ import annotations

import json
import logging
import random
from abc import abstractmethod
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.tasks.base import TaskSource
from appo_lightning.types import TaskRow

_logger = logging.getLogger("appo_lightning")
_BATCH_ROWS = 1024


class UnusableRow(Exception):
    """A record without a question or an answer; the message says what is missing."""


class FileTasks(TaskSource):
    """The usable rows of a ``.parquet`` or ``.jsonl`` file.

    Every row is checked once, when the source is made: unusable ones are left out with one notice. Afterwards rows are
    read when they are asked for; no question is kept in memory twice.

    Args:
        path: the file.
        limit: use at most so many rows, after shuffling; None uses all.
        shuffle_seed: order of the rows; None keeps the order of the file.

    Raises:
        ConfigurationError: limit is not positive.
        DataError: the file is missing, of an unknown kind or unreadable, lacks a column, or has no usable row.
    """

    # Alternatives are grouped: one column of each group must exist.
    required_columns: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def __init__(self, path: str, *, limit: int | None = None, shuffle_seed: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ConfigurationError(f"limit must be at least 1 or null for all rows, got {limit}")
        self.path, self.limit, self.shuffle_seed = path, limit, shuffle_seed
        self._path = Path(path)
        self._records = open_records(self._path)
        rows = self._usable_rows()
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(rows)
        self._rows = array("q", rows[:limit])

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> TaskRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path}")
        file_row = self._rows[index]
        return self._task(self._records.read(file_row), self._id(file_row))

    @abstractmethod
    def _task(self, record: dict[str, Any], row_id: str) -> TaskRow:
        """The question in a record.

        Raises:
            UnusableRow: the record has no question or no answer.
        """

    def _inspect(self, record: dict[str, Any], task: TaskRow) -> None:
        """See each usable record once, when the file is checked."""

    def _id(self, file_row: int) -> str:
        # The row of the file, not of this selection: seeds derived from it survive another limit or order.
        return f"{self._path.stem}-{file_row}"

    def _usable_rows(self) -> list[int]:
        usable: list[int] = []
        unusable, first_reason = 0, ""
        columns: set[str] = set()
        for file_row, record in enumerate(self._records):
            try:
                if isinstance(record, UnusableRow):
                    raise record
                columns.update(record)
                self._inspect(record, self._task(record, self._id(file_row)))
            except UnusableRow as reason:
                first_reason = first_reason or f"row {file_row}: {reason}"
                unusable += 1
            else:
                usable.append(file_row)
        self._require_columns(columns, rows=len(usable) + unusable)
        if not usable:
            raise DataError(
                f"{self.path}: expected questions with answers, found {unusable} rows and none usable "
                f"({first_reason}); correct the file"
            )
        if unusable:
            _logger.warning(
                "%s: left out %d of %d rows that cannot be used (the first is %s)",
                self._path.name,
                unusable,
                len(usable) + unusable,
                first_reason,
            )
        return usable

    def _require_columns(self, found: set[str], rows: int) -> None:
        if not rows:
            raise DataError(f"{self.path}: expected at least one row, found none; give a file that is not empty")
        for alternatives in self.required_columns:
            if found.isdisjoint(alternatives):
                wanted = " or ".join(repr(name) for name in alternatives)
                raise DataError(f"{self.path}: expected a column {wanted}, found {sorted(found)}; rename the column")


class Records(Protocol):
    """The rows of a file: all in order, or one by its number."""

    def __iter__(self) -> Iterator[dict[str, Any] | UnusableRow]: ...

    def read(self, row: int) -> dict[str, Any]: ...


def open_records(path: Path) -> Records:
    """The reader for a file's kind.

    Raises:
        DataError: the file is missing, of an unknown kind, or cannot be read.
    """
    readers: dict[str, type[_ParquetRecords] | type[_JsonLines]] = {
        ".parquet": _ParquetRecords,
        ".jsonl": _JsonLines,
    }
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(f"expected a file that ends in {' or '.join(readers)}, got {str(path)!r}")
    if not path.is_file():
        raise DataError(f"expected questions at {path}, found no file; correct the path")
    return reader(path)


class _ParquetRecords:
    """A table in Arrow's compact form; a row becomes Python objects only when it is read."""

    def __init__(self, path: Path) -> None:
        # Imported here: most runs read no parquet file.
        import pyarrow
        import pyarrow.parquet

        try:
            self._table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: expected a parquet file, found one that cannot be read ({reason})") from error

    def __iter__(self) -> Iterator[dict[str, Any] | UnusableRow]:
        for batch in self._table.to_batches(max_chunksize=_BATCH_ROWS):
            yield from batch.to_pylist()

    def read(self, row: int) -> dict[str, Any]:
        return self._table.slice(row, 1).to_pylist()[0]


class _JsonLines:
    """The positions of the lines; a line is read from the file when it is asked for. Blank lines are no rows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = array("q")

    def __iter__(self) -> Iterator[dict[str, Any] | UnusableRow]:
        self._starts = array("q")
        start = 0
        with self._path.open("rb") as lines:
            for line in lines:
                if line.strip():
                    self._starts.append(start)
                    yield _parse_line(line)
                start += len(line)

    def read(self, row: int) -> dict[str, Any]:
        with self._path.open("rb") as file:
            file.seek(self._starts[row])
            record = _parse_line(file.readline())
        if isinstance(record, UnusableRow):
            raise DataError(f"{self._path}: row {row} changed while it was in use ({record}); start again")
        return record


def _parse_line(line: bytes) -> dict[str, Any] | UnusableRow:
    try:
        record = json.loads(line)
    except ValueError as error:
        return UnusableRow(f"not JSON ({error})")
    return record if isinstance(record, dict) else UnusableRow(f"a JSON {type(record).__name__} instead of an object")


def references_of(answer: Any) -> tuple[str, ...]:
    """Every accepted answer: a text, a number, or a list of them.

    Raises:
        UnusableRow: there is none.
    """
    answers = answer if isinstance(answer, list | tuple) else [answer]
    references = tuple(
        dict.fromkeys(
            text for value in answers if isinstance(value, str | int | float) and (text := str(value).strip())
        )
    )
    if not references:
        raise UnusableRow(f"no answer ({answer!r:.40})")
    return references
