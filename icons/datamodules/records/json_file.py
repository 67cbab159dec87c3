"""RecordIndex: the records of a data file by position, read one at a time; memory does not grow with the file."""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from icons.datamodules.records.cache import cache_folder
from icons.datamodules.records.data_file import DataFile, stamp
from icons.datamodules.records.scan import Layout, scan
from icons.datamodules.records.source import RecordError, checked_row, decode, id_of
from icons.output import put, whole_file

_KEY = re.compile(rb'"(?:[^"\\]|\\.)*"\s*:\s*', re.DOTALL)
_AT_ONCE = 4096  # rows
_SCAN = 2  # raised when the scan finds other records in the same file
_OTHER_FORMS = (".parquet", ".arrow", ".tar")


class Identified(msgspec.Struct):
    """A record of which only the id is read."""

    id: Any = None


_ID = msgspec.json.Decoder(Identified)


class RecordIndex:
    """Byte ranges of a file's records: a JSON list, JSON Lines, or one object of records (its values are the records).

    `index[row]` is the decoded record, `index.raw(row)` its bytes as they stand in the file. A record that is not valid
    JSON keeps its row, and reading it raises. Blank lines of a JSONL file are no records.

    The ranges are found once, in one pass, and kept in the cache folder (`$ICONS_CACHE`, or `~/.cache/icons`) with the
    file's SHA-256. They are found anew when size, times, inode, or a sample of 64 blocks of the content differ. A file
    that changes while it is read is an error.

    Args:
        path: the data file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is empty, or neither a list, an object of records, nor JSON Lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such data file; expected JSON or JSONL")
        self.content = DataFile(self.path)
        kept, now = cache_file(self.path), f"{_SCAN} {stamp(self.path)}"
        layout = _read_cache(kept, now)
        if layout is None:
            layout = scan(self.path)
            self.content.state.check(self.path, self.path)
            _write_cache(kept, layout, now)
        self.layout = layout

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the whole file, its first 16 hex digits."""
        return self.layout.digest[:16]

    def __len__(self) -> int:
        return len(self.layout.ranges)

    def __getitem__(self, row: int) -> Any:
        """The decoded record.

        Raises:
            RecordError: it is not valid JSON.
            IndexError: there is no such row.
        """
        return decode(self.raw(row))

    def light(self, row: int) -> Any:
        return self[row]

    def id(self, row: int) -> str:
        content = self.raw(row)
        try:
            return id_of({"id": _ID.decode(content).id})
        except (ValueError, RecursionError):  # not JSON, or JSON with what only Python reads
            with contextlib.suppress(RecordError):
                return id_of(decode(content))
        return ""

    def raw(self, row: int) -> bytes:
        """The record's bytes, without what separates it from the next."""
        entry = self.entry(row)
        if self.layout.form != "object":
            return entry
        key = _KEY.match(entry)
        return entry[key.end() :] if key else entry

    def entry(self, row: int) -> bytes:
        """The record's bytes; in an object of records, with its key.

        Raises:
            ChangedFileError: the file is not the one that was opened.
        """
        checked_row(row, self)
        begin, end = self.layout.ranges[row].tolist()
        return self.content[begin:end].strip()

    def check_out(self, out: Path) -> Literal["file"]:
        if out.suffix in _OTHER_FORMS:
            raise ValueError(
                f"selection {out}: a selection has the form of its data, and {self.path} is JSON; expected a .json or "
                ".jsonl file"
            )
        return "file"

    def write_selection(self, rows: Iterable[int], out: Path) -> None:
        """Writes the records of `rows` byte for byte, in the file's own form and the order given; atomically."""
        self.check_out(out)
        begin, between, end = {"list": (b"[\n", b",\n", b"\n]\n"), "object": (b"{\n", b",\n", b"\n}\n")}.get(
            self.layout.form, (b"", b"\n", b"\n")
        )
        with whole_file(out) as partial, partial.open("wb", buffering=1 << 20) as file:
            file.write(begin)
            for number, entry in enumerate(self.content.parts(self.ranges_of(rows))):
                if number:
                    file.write(between)
                file.write(entry.strip())
            file.write(end)

    def ranges_of(self, rows: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Where these records begin and end; looked up many at once: one by one takes longer than to read them."""
        left = iter(rows)
        while several := list(islice(left, _AT_ONCE)):
            for row in (min(several), max(several)):
                checked_row(row, self)
            yield from map(tuple, self.layout.ranges[several].tolist())


def cache_file(path: Path) -> Path:
    return cache_folder() / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.records"


def _read_cache(file: Path, stamp: str) -> Layout | None:
    """The ranges found before, mapped and not read; None if there are none for this very content."""
    try:
        about = msgspec.json.decode(file.with_suffix(".about").read_bytes())
        if about["stamp"] != stamp:
            return None
        ranges = np.load(file.with_name(about["ranges"]), mmap_mode="r")
        return Layout(ranges, about["form"], about["digest"])
    except (OSError, ValueError, KeyError, msgspec.DecodeError):
        return None


def _write_cache(file: Path, layout: Layout, stamp: str) -> None:
    """Keeps what was found; a cache folder that cannot be written costs a scan the next time, nothing else."""
    with contextlib.suppress(OSError):
        name = f"{file.stem}-{layout.digest[:16]}.npy"
        about = {"stamp": stamp, "form": layout.form, "digest": layout.digest, "ranges": name}
        with whole_file(file.with_name(name)) as partial:
            np.save(partial, layout.ranges)
        put(file.with_suffix(".about"), msgspec.json.encode(about))
