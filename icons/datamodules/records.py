"""RecordIndex: the records of a data file by position, read one at a time, never all at once."""

import hashlib
import os
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from icons.datamodules.record_scan import Form, Ranges, read_blocks, recognise, scan

CACHE_FROM_BYTES = 1 << 24  # smaller files are indexed again faster than a second file is worth
HEADER_BYTES = 4096
VERSION = 1
ROWS_AT_ONCE = 4096
SEPARATORS = {"json": (b"[\n", b",\n", b"\n]\n"), "dict": (b"{\n", b",\n", b"\n}\n"), "jsonl": (b"", b"\n", b"\n")}


class RecordIndex:
    """Byte ranges of a file's records: a JSON list, JSON Lines, or a JSON object of records by key.

    `index[row]` is the decoded record, `index.raw(row)` its bytes. A record that is not valid JSON keeps its row and
    raises `msgspec.DecodeError` when it is decoded. Pickles to its path, so that workers share the index on disk.

    The index of a file of 16 MiB or more is kept beside it (`.NAME.index`), or in `$ICONS_CACHE` (default
    `~/.cache/icons`) where that folder cannot be written. It is used again only while the file's size, modification
    time and change time are what they were; the fingerprint is over the whole content, at every indexing.

    Args:
        path: the data file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is neither a JSON list, a JSON object of records, nor JSON Lines, or does not close.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such data file; expected LLaVA JSON or JSONL")
        header, self.ranges = find(self.path)
        self.form: Form = header["form"]
        self.fingerprint: str = header["fingerprint"]
        """SHA-256 (16 hex digits) of the whole file."""
        self.descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    @classmethod
    def open(cls, path: Path) -> "RecordIndex":
        return cls(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordIndex, (self.path,)

    def __len__(self) -> int:
        return len(self.ranges)

    def raw(self, row: int) -> bytes:
        begin, end = self.ranges[row].tolist()
        return os.pread(self.descriptor, end - begin, begin)

    def __getitem__(self, row: int) -> Any:
        return msgspec.json.decode(self.raw(row))

    def key(self, row: int) -> bytes:
        """What stands before the record of a `dict` file: its key and the colon."""
        begin = int(self.ranges[row, 0])
        before = int(self.ranges[row - 1, 1]) if row else 0
        return os.pread(self.descriptor, begin - before, before).lstrip(b"\xef\xbb\xbf{, \t\r\n")

    def write_selection(self, rows: Iterable[int], out: Path) -> None:
        """Writes the records of `rows`, byte for byte, in the file's own form and the order given.

        `out` is replaced only when all is written.
        """
        opening, between, closing = SEPARATORS[self.form]
        unfinished = out.with_name(f".{out.name}.{os.getpid()}.part")
        wanted = iter(rows)
        try:
            with unfinished.open("wb", buffering=1 << 20) as file:
                file.write(opening)
                lead = b""
                while some := list(islice(wanted, ROWS_AT_ONCE)):
                    file.write(lead + between.join(self.pieces(some)))
                    lead = between
                file.write(closing if lead or self.form != "jsonl" else b"")
            unfinished.replace(out)
        finally:
            unfinished.unlink(missing_ok=True)

    def pieces(self, rows: list[int]) -> Iterator[bytes]:
        ranges = self.ranges[np.asarray(rows, dtype=np.int64)].tolist()
        for row, (begin, end) in zip(rows, ranges, strict=True):
            record = os.pread(self.descriptor, end - begin, begin)
            yield self.key(row) + record if self.form == "dict" else record


def find(path: Path) -> tuple[dict[str, Any], Ranges]:
    """Header and ranges of the kept index, or of a new one."""
    state = os.stat(path)
    known = {"version": VERSION, "size": state.st_size, "mtime": state.st_mtime_ns, "ctime": state.st_ctime_ns}
    if state.st_size < CACHE_FROM_BYTES:
        parts: list[Ranges] = []
        header = build(path, parts.append)
        return header, np.concatenate([np.zeros((0, 2), dtype=np.int64), *parts])
    places = [path.with_name(f".{path.name}.index"), elsewhere(path)]
    for place in places:
        if (kept := read_kept(place)) is not None and known.items() <= kept[0].items():
            return kept
    place = next((place for place in places if writable(place.parent)), None)
    if place is None:
        raise PermissionError(
            f"{path}: its index can be kept neither beside it nor in {places[1].parent}; set ICONS_CACHE to a folder "
            "that can be written"
        )
    unfinished = place.with_name(f"{place.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            file.seek(HEADER_BYTES)
            header = known | build(path, lambda part: file.write(np.ascontiguousarray(part, np.int64).tobytes()))
            file.seek(0)
            file.write(msgspec.json.encode(header).ljust(HEADER_BYTES))
        unfinished.replace(place)
    finally:
        unfinished.unlink(missing_ok=True)
    kept = read_kept(place)
    assert kept is not None
    return kept


def build(path: Path, keep: Any) -> dict[str, Any]:
    """Scans the file, giving `keep` its ranges; the digest is made in a second thread meanwhile."""
    form, digest, rows = recognise(path), hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as thread:

        def blocks() -> Iterator[bytes]:
            pending = None
            for block in read_blocks(cast(Any, file)):
                if pending is not None:
                    pending.result()  # one block ahead at most, so that memory stays that of two
                pending = thread.submit(digest.update, block)
                yield block
            if pending is not None:
                pending.result()

        for part in scan(blocks(), form, path):
            rows += len(part)
            keep(part)
    return {"form": form, "rows": rows, "fingerprint": digest.hexdigest()[:16]}


def read_kept(place: Path) -> tuple[dict[str, Any], Ranges] | None:
    """A kept index; None if there is none, or it is not whole."""
    try:
        with place.open("rb") as file:
            header = msgspec.json.decode(file.read(HEADER_BYTES).strip())
        size, rows = place.stat().st_size, header["rows"]
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        return None
    if size != HEADER_BYTES + rows * 16:
        return None
    if rows == 0:
        return header, np.zeros((0, 2), dtype=np.int64)
    return header, np.memmap(place, dtype=np.int64, mode="r", offset=HEADER_BYTES, shape=(rows, 2))


def elsewhere(path: Path) -> Path:
    """The index's place in the cache folder, named after the data file's whole path."""
    folder = Path(os.environ.get("ICONS_CACHE") or Path.home() / ".cache" / "icons")
    return folder / f"{path.name}.{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.index"


def writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
