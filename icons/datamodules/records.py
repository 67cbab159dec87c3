"""RecordIndex: the records of a data file by position, read one at a time, never all at once."""

import hashlib
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np


class RecordIndex:
    """Byte ranges of a file's records: a JSON list, JSON Lines, or a dict of records.

    `index[row]` is the decoded record, `index.raw(row)` its bytes. A line that is not JSON keeps its row.

    Args:
        path: the data file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is neither a JSON list, a JSON object of records, nor JSON Lines.
    """

    def __init__(self, path: Path) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such data file; expected LLaVA JSON or JSONL")
        self.path = Path(path)
        self.ranges, self.form = scan(self.path)

    @classmethod
    def open(cls, path: Path) -> "RecordIndex":
        return cls(path)

    def __len__(self) -> int:
        return len(self.ranges)

    def raw(self, row: int) -> bytes:
        begin, end = self.ranges[row].tolist()
        with self.path.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def __getitem__(self, row: int) -> Any:
        return msgspec.json.decode(self.raw(row))

    @property
    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of the whole file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()[:16]

    def write_selection(self, rows: Iterable[int], out: Path) -> None:
        """Writes the records of `rows`, byte for byte, in the file's own form and the order given."""
        lines = self.form == "jsonl"
        with out.open("wb") as file:
            file.write(b"" if lines else b"[\n")
            for number, row in enumerate(rows):
                file.write(b"" if lines or number == 0 else b",\n")
                file.write(self.raw(row) + (b"\n" if lines else b""))
            file.write(b"" if lines else b"\n]\n")


def scan(path: Path) -> tuple[np.ndarray, str]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; expected LLaVA JSON or JSONL")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        head = content[:4096].lstrip()[:1]
        if head == b"[":
            try:
                records = msgspec.json.decode(content, type=list[msgspec.Raw])
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}: not valid JSON ({error}); expected a list of records") from None
            base = np.frombuffer(content, np.uint8).ctypes.data
            found = []
            for record in records:
                view = np.frombuffer(record, np.uint8)
                found.append((view.ctypes.data - base, view.ctypes.data - base + len(view)))
            del records, record, view
            return np.array(found, dtype=np.int64).reshape(-1, 2), "json"
        data = np.frombuffer(content, np.uint8)
        ends = np.flatnonzero(data == 10)
        if len(ends) == 0 or ends[-1] != len(data) - 1:
            ends = np.append(ends, len(data))
        del data
        begins = np.concatenate([[0], ends[:-1] + 1])
        keep = ends > begins
        return np.stack([begins, ends], axis=1)[keep].astype(np.int64), "jsonl"
