"""RecordSource: the records of a data file by position, whatever the file's form; and what a record's id is."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec


class RecordError(ValueError):
    """A record that cannot be read. It keeps its row, and costs no other."""


@runtime_checkable
class RecordSource(Protocol):
    """Records by row, read one at a time: memory does not grow with the file. Row i is record i, always.

    Attributes:
        path: where the records lie, or what they are called.
    """

    path: Path

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ when the content does."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any:
        """The record, as JSON's types (and bytes).

        Raises:
            RecordError: it cannot be read.
            IndexError: there is no such row.
        """
        ...

    def light(self, row: int) -> Any:
        """The record without the bytes of its images (which are empty in it), for what needs its texts alone.

        Raises:
            RecordError, IndexError: as for the whole record.
        """
        ...

    def id(self, row: int) -> str:
        """The record's id; empty for one that has none or cannot be read."""
        ...

    def check_out(self, out: Path) -> Literal["file", "folder"]:
        """What a selection of this name is; refuses a name that says another form than the data have.

        Raises:
            ValueError: `out` is called as another form's files are.
        """
        ...

    def write_selection(self, rows: Sequence[int], out: Path) -> None:
        """Writes the records of `rows` in the file's own form and the order given; atomically.

        Raises:
            ValueError: see `check_out`.
        """
        ...


def decode(content: bytes) -> Any:
    """A JSON value. NaN and infinities, which JSON does not have and Python's writer writes, are numbers.

    Raises:
        RecordError: it is not valid JSON, or nested too deeply.
    """
    try:
        return msgspec.json.decode(content)
    except (ValueError, RecursionError) as error:
        reason = error
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError):
        raise RecordError(f"not valid JSON: {reason}") from None


def id_of(record: Any) -> str:
    """A record's id as text; empty where it has none.

    >>> id_of({"id": 7}), id_of({"id": float("nan")}), id_of([])
    ('7', '', '')
    """
    value = record.get("id") if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return "" if isinstance(value, float) and math.isnan(value) else str(value)


def checked_row(row: int, source: RecordSource) -> int:
    """The row, if there is such a one.

    Raises:
        IndexError: there is not.
    """
    if not 0 <= row < len(source):
        raise IndexError(f"{source.path}: row {row}; expected 0 to {len(source) - 1}")
    return row
