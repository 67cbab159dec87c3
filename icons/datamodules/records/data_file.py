"""DataFile: a data file's bytes, read in a way that survives what others do to the file meanwhile; and what tells that
it is still the same.

Mapped memory would not survive it: reading behind the end of a file that was cut short ends the process without a word.
"""

import hashlib
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from icons.datamodules.records.cache import cache_folder
from icons.output import put

SAMPLES, SAMPLE_BYTES = 64, 4096
SMALL = 64 << 20  # bytes that are read again rather than looked up
_FIND_BYTES = 1 << 16


class ChangedFileError(OSError):
    """The data file is not the one that the run began with: no row's failure, but the end of the run."""

    def __init__(self, said: str) -> None:
        super().__init__(said.rpartition(f"{type(self).__name__}: ")[2].strip())  # without a worker's traceback


class State(NamedTuple):
    """What is looked at again and again while a run reads a file."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path | int) -> "State":
        about = os.fstat(file) if isinstance(file, int) else file.stat()
        return cls(about.st_size, about.st_mtime_ns, about.st_ino)

    def check(self, file: Path | int, path: Path) -> None:
        """Compares the file as it is now.

        Raises:
            ChangedFileError: it is another, or has another size or time.
        """
        try:
            now = State.of(file)
        except FileNotFoundError:
            raise ChangedFileError(f"{path}: has vanished while it was read; {_ADVICE}") from None
        if now != self:
            what = f"{now.size:,} bytes, {self.size:,} before" if now.size != self.size else "its content"
            raise ChangedFileError(f"{path}: has changed while it was read ({what}); {_ADVICE}")


_ADVICE = (
    "expected a file that stays as it is until the run has ended: put the former one back and run the same line again, "
    "or give a new --out"
)


class DataFile:
    """Bytes by place, `file[begin:end]`, from a file that must stay as it is.

    Args:
        path: the file.
        state: as it was when its records were found; default: as it is.

    Raises:
        FileNotFoundError: no such file.
    """

    def __init__(self, path: Path, state: State | None = None) -> None:
        self.path, self.state = path, State.of(path) if state is None else state
        self.number: int | None = None  # opened where it is used, and once for each process that it travels to
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type["DataFile"], tuple[Path, State]]:
        return type(self), (self.path, self.state)

    def __len__(self) -> int:
        return self.state.size

    def __getitem__(self, part: slice) -> bytes:
        """The bytes of a slice.

        Raises:
            ChangedFileError: the file is not what it was.
        """
        begin, end, _ = part.indices(self.state.size)
        number = self.opened()
        self.state.check(number, self.path)
        return self.read(number, begin, max(0, end - begin))

    def parts(self, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of many ranges, each with its begin and its end. They may be trusted once all have come, and the
        file has been found to be what it was.

        Raises:
            ChangedFileError: it is not.
        """
        number = self.opened()
        self.state.check(number, self.path)
        for begin, end in ranges:
            yield self.read(number, begin, end - begin)
        self.state.check(number, self.path)

    def opened(self) -> int:
        if self.number is None:
            self.number = self.open()
        return self.number

    def open(self) -> int:
        try:
            number = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            raise ChangedFileError(f"{self.path}: has vanished while it was read; {_ADVICE}") from None
        weakref.finalize(self, os.close, number)
        return number

    def read(self, number: int, begin: int, length: int) -> bytes:
        if hasattr(os, "pread"):  # leaves alone the place in the file, which forked workers share
            content = os.pread(number, length, begin)
        else:
            with self.lock:
                os.lseek(number, begin, os.SEEK_SET)
                content = os.read(number, length)
        if content and len(content) < length:  # a read of more than 2 GB comes in parts
            return content + self.read(number, begin + len(content), length - len(content))
        if len(content) < length:
            raise ChangedFileError(f"{self.path}: was cut short while it was read; {_ADVICE}")
        return content

    def find(self, wanted: bytes, begin: int) -> int:
        """The first place of one byte at or behind `begin`; -1: there is none."""
        while begin < len(self):
            index = self[begin : begin + _FIND_BYTES].find(wanted)
            if index >= 0:
                return begin + index
            begin += _FIND_BYTES
        return -1


def stamp(path: Path) -> str:
    """What tells, without reading all of it, whether a file is still the same: size, both times (that of the last
    change to the file's entry, which nobody can set back, too), inode, and a hash of 64 evenly spaced blocks."""
    about, digest = path.stat(), hashlib.sha256()
    with path.open("rb") as file:
        for begin in np.linspace(0, max(0, about.st_size - SAMPLE_BYTES), SAMPLES).astype(int).tolist():
            file.seek(begin)
            digest.update(file.read(SAMPLE_BYTES))
    return f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino} {digest.hexdigest()}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> bytes:
    """SHA-256 of a whole file; of a large one read once, and kept in the cache folder by its stamp.

    Raises:
        ChangedFileError: the file has changed while it was read.
    """
    if path.stat().st_size <= SMALL:
        return bytes.fromhex(sha256(path))
    kept = cache_folder() / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.digest"
    now = stamp(path)
    with suppress(OSError, ValueError, KeyError, TypeError):
        about = msgspec.json.decode(kept.read_bytes())
        if about["stamp"] == now:
            return bytes.fromhex(about["digest"])
    state = State.of(path)
    digest = sha256(path)
    state.check(path, path)
    with suppress(OSError):  # a cache folder that cannot be written costs reading it again, nothing else
        put(kept, msgspec.json.encode({"stamp": now, "digest": digest}))
    return bytes.fromhex(digest)
