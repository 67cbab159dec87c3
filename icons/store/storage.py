"""Where stores lie: a folder or an object store, with atomic files and a few plain operations on keys.

A file is written beside its name and then renamed: a reader sees the old file or the new one, never a part. What a
later file promises (a unit's `status`) must not outlive what it promises (its rows) when the machine loses power, so
`flush` makes everything durable that was written before it; many files together, since one `fsync` costs milliseconds
and a disk takes many at once for little more. Object stores are durable by themselves.
"""

import asyncio
import errno
import importlib
import os
import threading
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

T = TypeVar("T")
PARTIAL = ".partial"
FLUSHES = 16  # at once
VOLATILE = "status/lease/"  # who computes what is worth nothing after a loss of power


def is_url(path: str | Path) -> bool:
    """Whether `path` names an object store (`s3://bucket/name`) and not a folder.

    >>> is_url("s3://bucket/train.zarr"), is_url("runs/train.zarr")
    (True, False)
    """
    return "://" in str(path)


class Storage:
    """A place that holds one store: reads and writes whole keys; `zarr_store` is the same place for zarr.

    Args:
        path: a folder, or a URL that obstore knows (`s3://`, `gs://`, `az://`, `memory://`); credentials come from the
            environment, as usual for the service.
        mode: "r" reads, "r+" writes too, "w" makes the folder.

    Raises:
        FileNotFoundError: no folder there, in mode "r" or "r+".
        NotADirectoryError: a file lies there.
        PermissionError: the folder cannot be written, in mode "r+" or "w".
        ModuleNotFoundError: a URL, and obstore is not installed.
    """

    def __init__(self, path: str | Path, mode: str = "r") -> None:
        self.path, self.mode = str(path), mode
        self.zarr_store: Store = open_url(self.path, mode) if is_url(path) else open_folder(Path(path), mode)
        # a folder is asked directly: zarr would ask it in another thread, which takes ten times as long
        self.folder = self.zarr_store if isinstance(self.zarr_store, DurableLocalStore) else None

    def get(self, key: str) -> bytes | None:
        if self.folder:
            return self.folder.read(key)
        found = run(self.zarr_store.get(key, default_buffer_prototype()))
        return None if found is None else found.to_bytes()

    def get_array(self, key: str) -> np.ndarray | None:
        """The bytes of `key`, `[bytes]` uint8, in memory of their own."""
        if self.folder:
            return self.folder.read_array(key)
        found = self.get(key)
        return None if found is None else np.frombuffer(bytearray(found), np.uint8)

    def put(self, key: str, value: bytes) -> None:
        run(self.zarr_store.set(key, as_buffer(value)))

    def put_parts(self, key: str, parts: Sequence[bytes | memoryview]) -> None:
        """`put` of a value that lies in several pieces of memory."""
        if self.folder:
            self.folder.set_parts(key, parts)
        else:
            self.put(key, b"".join(parts))

    def put_new(self, key: str, value: bytes) -> bool:
        """Writes `key` unless it exists, atomically; whether it was written. `value` must differ from any other's."""
        if self.folder:
            return self.folder.create_sync(key, value)
        run(self.zarr_store.set_if_not_exists(key, as_buffer(value)))
        return self.get(key) == value

    def delete(self, key: str) -> None:
        if self.folder:
            return self.folder.delete_sync(key)
        return run(self.zarr_store.delete(key))

    def flush(self) -> None:
        """Waits until everything that was written so far would survive a loss of power.

        Raises:
            OSError: the disk says that it has not kept what it took.
        """
        if self.folder:
            self.folder.flush()

    def flush_deleted(self, keys: Sequence[str]) -> None:
        """Waits until the deletion of `keys` would survive a loss of power."""
        if self.folder:
            for parent in {(self.folder.root / key).parent for key in keys}:
                flush_path(parent)

    def exists(self, key: str) -> bool:
        return (self.folder.root / key).is_file() if self.folder else run(self.zarr_store.exists(key))

    def size(self, key: str) -> int:
        return run(self.zarr_store.getsize(key))

    def list(self, prefix: str) -> list[str]:
        """Every key that lies below `prefix`, sorted."""
        return run(collect(self.zarr_store, prefix))

    def first(self, wanted: Callable[[str], bool]) -> str | None:
        """Some key that is wanted; looks no further than that."""
        return run(first(self.zarr_store, wanted))


def run(work: Coroutine[Any, Any, T]) -> T:
    return sync(work)


def as_buffer(value: bytes) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(value)


async def collect(store: Store, prefix: str) -> list[str]:
    return sorted([key async for key in store.list_prefix(prefix)])


async def first(store: Store, wanted: Callable[[str], bool]) -> str | None:
    async for key in store.list_prefix(""):
        if wanted(key):
            return key
    return None


def open_folder(path: Path, mode: str) -> Store:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"store {path}: is a file; expected a folder")
    if mode == "w":
        path.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        raise FileNotFoundError(f"store {path}: no such folder")
    if mode != "r" and not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"store {path}: the folder is read-only; expected one that can be written")
    return DurableLocalStore(path, read_only=mode == "r")


def open_url(url: str, mode: str) -> Store:
    try:
        obstore = importlib.import_module("obstore.store")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"store {url}: object stores need obstore, which is not installed; pip install 'icons-lightning[s3]'"
        ) from error
    return zarr.storage.ObjectStore(obstore.from_url(url), read_only=mode == "r")


class DurableLocalStore(LocalStore):
    """zarr's LocalStore, which remembers what was written until it is flushed; a vanished folder is not made anew."""

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.unflushed: list[Path] = []
        self.pool = ThreadPoolExecutor(FLUSHES, "icons-flush")
        self.flushing = threading.Lock()  # who comes second waits for the first, who may be flushing the second's files

    def flush(self) -> None:
        with self.flushing:
            paths = list(self.unflushed)
            if paths:
                try:
                    self.flush_paths(paths)
                except FileNotFoundError as error:
                    raise_if_vanished(self.root, error)
                    raise
            for path in paths:  # not after an error: nobody is told that these files are safe
                self.forget(path)

    def flush_paths(self, paths: list[Path]) -> None:
        """`fsync` of files and of the folders that name them, side by side."""
        folders = {folder for path in paths for folder in (path.parent, path.parent.parent)}
        list(self.pool.map(flush_path, [*paths, *folders]))

    def forget(self, path: Path) -> None:
        with suppress(ValueError):
            self.unflushed.remove(path)

    def read(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def read_array(self, key: str) -> np.ndarray | None:
        try:
            return np.fromfile(self.root / key, np.uint8)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def delete_sync(self, key: str) -> None:
        self._check_writable()
        self.forget(self.root / key)
        (self.root / key).unlink(missing_ok=True)

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self.delete_sync, key)

    def set_sync(self, key: str, value: Buffer) -> None:
        self.set_parts(key, [value.as_buffer_like()])

    def set_parts(self, key: str, parts: Sequence[Any]) -> None:
        self._check_writable()
        self.remember(key, write_file(self.root, key, parts, exclusive=False))

    async def _set(self, key: str, value: Buffer, exclusive: bool = False) -> None:
        self._check_writable()
        self.remember(key, await asyncio.to_thread(write_file, self.root, key, [value.as_buffer_like()], exclusive))

    def create_sync(self, key: str, value: bytes) -> bool:
        """Writes `key` unless it exists; whether it was written."""
        self._check_writable()
        try:
            self.remember(key, write_file(self.root, key, [value], exclusive=True))
        except FileExistsError:
            return False
        return True

    def remember(self, key: str, path: Path) -> None:
        if not key.startswith(VOLATILE):
            self.unflushed.append(path)


def flush_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(root: Path, key: str, parts: Sequence[Any], exclusive: bool) -> Path:
    """Writes one key below `root` and renames it into place (`exclusive`: links it, which fails if it exists).

    Raises:
        FileNotFoundError: `root` is gone.
        FileExistsError: `exclusive`, and the key exists.
        OSError: whatever the disk says (full, read-only, `exclusive` without hard links); nothing is left behind then.
    """
    path = root / key
    make_parents(root, path.parent)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.writelines(parts)
        if not exclusive:
            return partial.replace(path)
        link(partial, path)
        partial.unlink()
        return path
    except BaseException as error:
        partial.unlink(missing_ok=True)
        raise_if_vanished(root, error)
        raise


def link(partial: Path, path: Path) -> None:
    """The rename that fails if the name is taken, also when two processes try at once."""
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        message = (
            f"{path.parent}: this file system has no hard links, by which runs agree on who computes what; expected one "
            "that has them (ext4, XFS, NFS, Lustre, ...): put the store there, or give an object store by its URL (s3://)"
        )
        raise OSError(error.errno, message) from error


def raise_if_vanished(root: Path, error: BaseException) -> None:
    """A missing file means nothing to the user; that the whole store is missing does."""
    if isinstance(error, FileNotFoundError) and not (root / "zarr.json").exists():
        message = f"store {root}: has vanished while it was being written; put it back, or start anew"
        raise FileNotFoundError(message) from error


def make_parents(root: Path, folder: Path) -> None:
    """Makes the folders between `root` and `folder`, and never `root` itself."""
    if folder.is_dir():
        return
    if not root.is_dir():
        raise FileNotFoundError(f"store {root}: has vanished while it was being written; put it back, or start anew")
    if folder != root:
        make_parents(root, folder.parent)
        folder.mkdir(exist_ok=True)
