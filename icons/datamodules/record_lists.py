"""Lists of records: files of rows or ids, the records' ids, and their sources."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from icons.consensus.budget import Sources
from icons.datamodules.records import RecordIndex


class Identified(msgspec.Struct):
    """A record of which only the id is read."""

    id: str | int | None = None


def entries_of(path: Path) -> list[int | str]:
    """The entries of a list: integers are rows, strings are ids.

    A .txt file has one row number a line. A JSON or JSONL file holds row numbers, ids, or records with an `id`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an entry is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"list {path}: no such file; expected row numbers (.txt), or ids or records (.json, .jsonl)"
        )
    content = path.read_bytes()
    if path.suffix == ".txt":
        return [as_row(word, path) for word in content.decode().split()]
    try:
        if content.lstrip()[:1] == b"[":
            found = msgspec.json.decode(content, type=list[Identified | str | int])
        else:
            found = msgspec.json.Decoder(Identified | str | int).decode_lines(content)
    except msgspec.MsgspecError as error:
        raise ValueError(f"list {path}: {error}; expected row numbers, ids, or records with an id") from error
    return [str(entry.id) if isinstance(entry, Identified) else entry for entry in found]


def as_row(word: str, path: Path) -> int:
    if not word.isdecimal():
        raise ValueError(f"list {path}: got {word!r}; expected row numbers, one a line (ids belong into a .json file)")
    return int(word)


def rows_of(path: Path, index: RecordIndex) -> list[int]:
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


def ids_of(index: RecordIndex, rows: Sequence[int]) -> list[str]:
    """The ids of the given records; empty for one that has none or cannot be read."""
    decoder = msgspec.json.Decoder(Identified)
    found = []
    for row in rows:
        try:
            name = decoder.decode(index.raw(row)).id
        except msgspec.DecodeError:
            name = None
        found.append("" if name is None else str(name))
    return found


def sources_of(index: RecordIndex, field: str | None) -> Sources:
    """The source of every record: a field of it (dotted for one inside another), or the first folder of its image."""
    names: dict[str, int] = {}
    codes = np.empty(len(index), np.int32)
    for row in range(len(index)):
        try:
            record = index[row]
        except msgspec.DecodeError:
            record = None
        source = source_of(record, field) if isinstance(record, Mapping) else "(unreadable)"
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
        value: Any = record
        for key in field.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return "(none)" if value is None else str(value)
    image = record.get("image")
    if isinstance(image, list):
        image = image[0] if image else None
    if not isinstance(image, str) or image.strip().lower() in ("", "none", "nan"):
        return "text only"
    folder, slash, _ = image.strip("/").partition("/")
    return folder if slash else "images"
