"""Where stores lie: a folder or an object store, with atomic, durable files and a few plain operations on keys.

Every file is written beside its name, flushed to the disk (`fsync`), and then renamed: a reader sees the old file or
the new one, never a part, and what a later file promises (a unit's `status`) cannot outlive what it promises (its rows)
when the machine loses power. The price is measured by `scripts/bench_store.py`.
"""

import importlib
import os
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

T = TypeVar("T")
PARTIAL = ".partial"


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

    @property
    def is_local(self) -> bool:
        return isinstance(self.zarr_store, LocalStore)

    def get(self, key: str) -> bytes | None:
        found = run(self.zarr_store.get(key, default_buffer_prototype()))
        return None if found is None else found.to_bytes()

    def put(self, key: str, value: bytes) -> None:
        run(self.zarr_store.set(key, as_buffer(value)))

    def put_new(self, key: str, value: bytes) -> bool:
        """Writes `key` unless it exists, atomically; whether it was written. `value` must differ from any other's."""
        run(self.zarr_store.set_if_not_exists(key, as_buffer(value)))
        return self.get(key) == value

    def delete(self, key: str) -> None:
        run(self.zarr_store.delete(key))

    def exists(self, key: str) -> bool:
        return run(self.zarr_store.exists(key))

    def size(self, key: str) -> int:
        return run(self.zarr_store.getsize(key))

    def list(self, prefix: str) -> list[str]:
        """Every key that lies below `prefix`, sorted."""
        return run(collect(self.zarr_store, prefix))


def run(work: Coroutine[Any, Any, T]) -> T:
    return sync(work)


def as_buffer(value: bytes) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(value)


async def collect(store: Store, prefix: str) -> list[str]:
    return sorted([key async for key in store.list_prefix(prefix)])


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
    """zarr's LocalStore with `fsync` before the rename, and without making a vanished folder anew."""

    def set_sync(self, key: str, value: Buffer) -> None:
        self._check_writable()
        write_file(self.root, key, value, exclusive=False)

    async def _set(self, key: str, value: Buffer, exclusive: bool = False) -> None:
        import asyncio

        self._check_writable()
        await asyncio.to_thread(write_file, self.root, key, value, exclusive)


def write_file(root: Path, key: str, value: Buffer, exclusive: bool) -> None:
    """Writes one key below `root`: flushed, then renamed into place (`exclusive`: linked, which fails if it exists).

    Raises:
        FileNotFoundError: `root` is gone.
        FileExistsError: `exclusive`, and the key exists.
        OSError: whatever the disk says (full, read-only); nothing is left behind then.
    """
    path = root / key
    make_parents(root, path.parent)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(value.as_buffer_like())
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(partial, path)
        else:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def make_parents(root: Path, folder: Path) -> None:
    """Makes the folders between `root` and `folder`, and never `root` itself."""
    if folder.is_dir():
        return
    if not root.is_dir():
        raise FileNotFoundError(f"store {root}: the folder has vanished while it was being written")
    if folder != root:
        make_parents(root, folder.parent)
        folder.mkdir(exist_ok=True)
