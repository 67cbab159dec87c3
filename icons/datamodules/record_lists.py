"""Lists of records: files of rows or ids, the records' ids, and their sources."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from icons.consensus.budget import Sources
from icons.datamodules.dialects import images_within
from icons.datamodules.failed_row import FailedRowError
from icons.datamodules.records import RecordError, RecordSource
from icons.datamodules.records.json_file import Identified
from icons.datamodules.records.source import id_of


def entries_of(path: Path) -> list[int | str]:
    """The entries of a list: integers are rows, strings are ids.

    A .txt file has one row number a line. A JSON or JSONL file holds row numbers, ids, or records with an `id`.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        ValueError: an entry is something else.
    """
    if path.is_dir():
        raise IsADirectoryError(
            f"list {path}: is a folder; expected a selection, row numbers (.txt), or ids or records (.json, .jsonl)"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"list {path}: no such file; expected row numbers (.txt), or ids or records (.json, .jsonl)"
        )
    content = path.read_bytes()
    if path.suffix == ".txt":
        return [_as_row(word, path) for word in content.decode().split()]
    try:
        if content.lstrip()[:1] == b"[":
            entries = msgspec.json.decode(content, type=list[Identified | str | int])
        else:
            entries = msgspec.json.Decoder(Identified | str | int).decode_lines(content)
    except msgspec.MsgspecError as error:
        raise ValueError(f"list {path}: {error}; expected row numbers, ids, or records with an id") from error
    named = [id_of({"id": entry.id}) if isinstance(entry, Identified) else entry for entry in entries]
    if "" in named:
        raise ValueError(
            f"list {path}: entry {named.index('') + 1} has no id; expected row numbers, ids, or records with an id"
        )
    return named


def _as_row(word: str, path: Path) -> int:
    if not word.isdecimal():
        raise ValueError(f"list {path}: got {word!r}; expected row numbers, one a line (ids belong into a .json file)")
    return int(word)


def rows_of(path: Path, index: RecordSource) -> list[int]:
    """The rows that a list names, ascending; an id names every record that has it.

    Raises:
        ValueError: no record has an id of the list.
    """
    entries = entries_of(path)
    rows = {entry for entry in entries if isinstance(entry, int)}
    wanted = {entry for entry in entries if isinstance(entry, str)}
    if wanted:
        ids = ids_of(index, range(len(index)))
        unknown = wanted.difference(ids)
        if unknown:
            raise ValueError(f"list {path}: no record has the id {min(unknown)!r} ({len(unknown)} ids are unknown)")
        rows |= {row for row, name in enumerate(ids) if name in wanted}
    return sorted(rows)


def ids_of(index: RecordSource, rows: Sequence[int]) -> list[str]:
    """The ids of the given records; empty for one that has none or cannot be read."""
    return [index.id(row) for row in rows]


def readable(index: RecordSource) -> Iterator[Mapping[str, Any] | None]:
    """The records in order; None for one that cannot be read or is no object."""
    for row in range(len(index)):
        try:
            record = index.light(row)
        except RecordError:
            record = None
        yield record if isinstance(record, Mapping) else None


def value_at(record: Mapping[str, Any] | None, field: str, default: Any = None) -> Any:
    """A field of a record; dots reach inside.

    >>> value_at({"provenance": {"kind": "wrong"}}, "provenance.kind"), value_at({"provenance": 1}, "provenance.kind")
    ('wrong', None)
    """
    value: Any = record
    for key in field.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return default if value is None else value


def sources_of(index: RecordSource, field: str | None) -> Sources:
    """The source of every record: a field of it (dotted for one inside another), or the first folder of its image."""
    names: dict[str, int] = {}
    codes = np.empty(len(index), np.int32)
    for row, record in enumerate(readable(index)):
        source = "(unreadable)" if record is None else source_of(record, field)
        codes[row] = names.setdefault(source, len(names))
    return Sources(codes, list(names))


def source_of(record: Mapping[str, Any], field: str | None) -> str:
    """Where a record comes from: its `field` (dots reach inside), or else the first folder of its image.

    >>> source_of({"provenance": {"kind": "wrong"}}, "provenance.kind")
    'wrong'
    >>> source_of({"image": "coco/train2017/1.jpg"}, None), source_of({"image": ""}, None)
    ('coco', 'text only')
    """
    if field is not None:
        return str(value_at(record, field, "(none)"))
    try:
        images = images_within(record)
    except FailedRowError:
        return "(unreadable)"
    if not images:
        return "text only"
    if images[0].name.startswith("data:"):
        return "images"
    folder, slash, _ = images[0].name.strip("/").partition("/")
    return folder if slash else "images"
