"""A folder as zarr sees one: atomic files, and `flush`, after which they survive a loss of power.

A file is written beside its name and then renamed: a reader sees the old file or the new one, never a part. What a
later file promises (a unit's `status`) must not outlive what it promises (its rows) when the machine loses power, so
`flush` makes everything durable that was written before it; many files together, since one `fsync` costs milliseconds
and a disk takes many at once for little more. A file that a reader trusts by its name alone (`zarr.json`, `status`) is
durable before it gets its name: after a cut it would otherwise be there and empty.
"""

import asyncio
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from icons.output import flush_path, sweep_partials
from icons.store.chunk import check_unwritten
from icons.store.file import (
    Guard,
    LostUnit,
    checked_file,
    link,
    nothing,
    raise_if_vanished,
    read_file,
    remove,
    write_file,
    write_partial,
)

_FLUSHES = 16  # at once
_LARGE = 1 << 20  # bytes of a file that the disk is given at once, while others are still being written
_VOLATILE = "status/lease/"  # who computes what is worth nothing after a loss of power


class DurableLocalStore(LocalStore):
    """zarr's LocalStore, which remembers what was written until it is flushed; a vanished folder is not made anew.

    A chunk that is missing although its unit is finished is an error for every reader, zarr's own included.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.place = str(self.root)
        self.unflushed: list[str] = []
        self.changing = threading.Lock()  # held while that list is changed
        self.begun: dict[str, Future[None]] = {}  # those of its files whose content is on its way to the disk
        self.named: set[str] = set()  # folders whose own names are durable
        self.pool = ThreadPoolExecutor(_FLUSHES, "icons-flush")
        self.flushing = threading.Lock()  # who comes second waits for the first, who may be flushing the second's files

    def flush(self, also: Iterable[str] = ()) -> None:
        """Makes durable what was written so far, and further files, with the names of the folders in which it lies."""
        with self.flushing:
            paths = list(self.unflushed)
            try:
                self.flush_paths([*paths, *also])
            except FileNotFoundError as error:
                raise_if_vanished(self.place, error)
                raise
            for path in paths:  # not after an error: nobody is told that these files are safe
                self.forget(path)

    def flush_paths(self, paths: Iterable[str]) -> None:
        """`fsync` of files and of the folders that name them, all side by side; a folder above those only until its
        names have been durable once."""
        files: dict[str, None] = dict.fromkeys(paths)
        folders: set[str] = set()
        for folder in map(_parent, files):
            while folder not in folders:
                folders.add(folder)
                if folder in self.named or folder == self.place:
                    break
                folder = _parent(folder)
        begun = {path: self.begun.pop(path) for path in files if path in self.begun}
        self.flush_side_by_side([*(files.keys() - begun.keys()), *(folders - files.keys())])
        for content in begun.values():
            content.result()
        self.named |= folders

    def flush_side_by_side(self, paths: Sequence[str]) -> None:
        """`fsync` of all; a part of them for each thread, since handing over costs as much as a small file."""
        for done in [
            self.pool.submit(_flush_each, paths[start::_FLUSHES]) for start in range(min(_FLUSHES, len(paths)))
        ]:
            done.result()

    def flush_deleted(self, keys: Sequence[str]) -> None:
        for parent in {_parent(self.path_of(key)) for key in keys}:
            flush_path(parent)

    def forget(self, path: str) -> None:
        with self.changing, suppress(ValueError):
            self.unflushed.remove(path)

    def path_of(self, key: str) -> str:
        return f"{self.place}/{key}"

    async def get(self, key: str, *rest: Any, **options: Any) -> Buffer | None:
        with suppress(FileNotFoundError, NotADirectoryError):
            checked_file(self.path_of(key))
        value = await super().get(key, *rest, **options)
        return self._checked(key, value)

    def get_sync(self, key: str, *rest: Any, **options: Any) -> Buffer | None:
        return self._checked(key, super().get_sync(key, *rest, **options))

    def _checked(self, key: str, value: Buffer | None) -> Buffer | None:
        if value is None:
            check_unwritten(key, self.is_file)
        return value

    def is_file(self, key: str) -> bool:
        return os.path.isfile(self.path_of(key))

    def stamp(self, key: str) -> tuple[int, int, int] | None:
        try:
            about = os.stat(self.path_of(key))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return about.st_ino, about.st_mtime_ns, about.st_size

    def read(self, key: str) -> bytes | None:
        return read_file(self.path_of(key))

    def read_array(self, key: str) -> np.ndarray | None:
        """The bytes of `key`, `[bytes]` uint8, in memory of their own."""
        try:
            return np.fromfile(checked_file(self.path_of(key)), np.uint8)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def keys(self, prefix: str) -> list[str]:
        """Every file below a folder of the store, sorted."""
        keys: list[str] = []
        waiting = [prefix.rstrip("/")]
        while waiting:
            folder = waiting.pop()
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / folder) as entries:
                for entry in entries:
                    key = f"{folder}/{entry.name}" if folder else entry.name
                    (waiting if entry.is_dir() else keys).append(key)
        return sorted(keys)

    def sweep(self, units: Iterable[int]) -> None:
        """Removes what killed runs of this machine left half-written: of the store, and of these units. What living
        ones are writing stays, and what other machines' have left (`verify --repair` removes it)."""
        sweep_partials(self.root)
        wanted = {str(unit) for unit in units}
        for array in _folders_in(self.root):
            for part in ("", "c", "lease", "digest"):
                sweep_partials(array / part)
            for name in wanted.intersection(folder.name for folder in _folders_in(array / "c")):
                sweep_partials(array / "c" / name)  # a unit's own, where an array has several dimensions

    def delete_sync(self, key: str) -> None:
        self._check_writable()
        self.forget(path := self.path_of(key))
        remove(path)

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self.delete_sync, key)

    def set_sync(self, key: str, value: Buffer) -> None:
        self.set_parts(key, [value.as_buffer_like()])

    def set_parts(self, key: str, parts: Sequence[Any]) -> None:
        self._check_writable()
        self.remember(key, write_file(self.place, key, parts))

    @contextmanager
    def partials(self, values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, str]]:
        """Files written beside the names that they are to have, by key, in this order; what is still there at the end
        is removed."""
        self._check_writable()
        partials: dict[str, str] = {}
        try:
            for key, parts in values.items():
                partials[key] = write_partial(self.place, key, parts)
            yield partials
        finally:
            for partial in partials.values():
                remove(partial)

    def named_file(self, partials: dict[str, str], key: str) -> str:
        """Gives one of these files its name."""
        os.replace(partials[key], path := self.path_of(key))
        del partials[key]
        return path

    def set_together(self, values: Mapping[str, Sequence[Any]], guard: Guard) -> None:
        """Writes files that get their names one right after the other, unless the guard objects."""
        size = {key: sum(map(len, parts)) for key, parts in values.items()}
        # large ones last, so that they are on their way to the disk as soon as they are written
        with self.partials({key: values[key] for key in sorted(values, key=size.__getitem__)}) as partials:
            try:
                guard()
                for key in values:
                    path = self.named_file(partials, key)
                    if size[key] >= _LARGE:
                        self.begun[path] = self.pool.submit(flush_path, path)
                    self.remember(key, path)
            except FileNotFoundError as error:
                raise_if_vanished(self.place, error)
                raise

    def set_whole(self, values: Mapping[str, Sequence[Any]], guards: Mapping[str, Guard]) -> list[str]:
        """Writes files each of which has its name only once it, and all that was written before, is durable; the keys
        for which no guard has objected."""
        written = []
        with self.partials(values) as partials:
            self.flush(partials.values())  # with the rest, since a disk takes many at once for little more
            for key in values:
                with suppress(LostUnit):
                    guards.get(key, nothing)()
                    self.remember(key, _parent(self.named_file(partials, key)))  # its content is durable
                    written.append(key)
        return written

    async def _set(self, key: str, value: Buffer, exclusive: bool = False) -> None:
        self._check_writable()
        parts = [value.as_buffer_like()]
        self.remember(key, await asyncio.to_thread(write_file, self.place, key, parts, exclusive=exclusive))

    def create_whole(self, values: Mapping[str, bytes]) -> list[str]:
        """Writes those keys that do not exist, each durable before it has its name; the keys that did."""
        existed = []
        with self.partials({key: [value] for key, value in values.items()}) as partials:
            self.flush_side_by_side(list(partials.values()))
            for key, partial in partials.items():
                try:
                    link(partial, path := self.path_of(key))
                    self.remember(key, path)
                except FileExistsError:
                    existed.append(key)
        return existed

    def create_sync(self, key: str, value: bytes) -> bool:
        """Writes `key` unless it exists; whether it was written."""
        self._check_writable()
        try:
            self.remember(key, write_file(self.place, key, [value], exclusive=True))
        except FileExistsError:
            return False
        return True

    def remember(self, key: str, path: str) -> None:
        if not key.startswith(_VOLATILE):
            with self.changing:
                self.unflushed.append(path)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _flush_each(paths: Iterable[str]) -> None:
    for path in paths:
        flush_path(path)
