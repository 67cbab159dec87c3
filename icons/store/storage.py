"""Where stores lie: a folder or an object store, with a few plain operations on whole keys."""

import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync

from icons.store.file import Guard, LostUnit, make_root, nothing
from icons.store.folder import DurableLocalStore
from icons.store.object_store import open_url

_T = TypeVar("_T")


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
        self.zarr_store: Store = open_url(self.path, mode) if is_url(path) else _open_folder(Path(path), mode)
        # a folder is asked directly: zarr would ask it in another thread, which takes ten times as long
        self.folder = self.zarr_store if isinstance(self.zarr_store, DurableLocalStore) else None

    def get(self, key: str) -> bytes | None:
        if self.folder:
            return self.folder.read(key)
        value = _run(self.zarr_store.get(key, default_buffer_prototype()))
        return None if value is None else value.to_bytes()

    def put(self, key: str, value: bytes) -> None:
        if self.folder:
            self.folder.set_parts(key, [value])
        else:
            _run(self.zarr_store.set(key, _as_buffer(value)))

    def put_together(self, values: Mapping[str, Sequence[bytes | memoryview]], guard: Guard = nothing) -> None:
        """`put` of several, each of which lies in some pieces of memory; `guard` is called before they are to be seen.

        Raises:
            LostUnit: the guard has objected; what is not yet seen is not written then.
        """
        if self.folder:
            return self.folder.set_together(values, guard)
        for key, parts in values.items():
            guard()
            self.put(key, b"".join(parts))
        return None

    def put_whole(self, values: Mapping[str, Sequence[bytes | memoryview]], guards: Mapping[str, Guard]) -> list[str]:
        """`put_together` with a guard for each; they survive a loss of power from the moment they are seen, as does
        what was written before. The keys that were written, since a guard that objects keeps its own from it."""
        if self.folder:
            return self.folder.set_whole(values, guards)
        return [key for key, parts in values.items() if self.was_put(key, parts, guards.get(key, nothing))]

    def was_put(self, key: str, parts: Sequence[bytes | memoryview], guard: Guard) -> bool:
        try:
            self.put_together({key: parts}, guard)
        except LostUnit:
            return False
        return True

    def put_new(self, key: str, value: bytes) -> bool:
        """Writes `key` unless it exists, atomically; whether it was written. `value` must differ from any other's."""
        if self.folder:
            return self.folder.create_sync(key, value)
        _run(self.zarr_store.set_if_not_exists(key, _as_buffer(value)))
        return self.get(key) == value

    def put_all_new(self, values: Mapping[str, bytes]) -> list[str]:
        """`put_new` of several, each of which survives a loss of power from the moment it is seen; those that existed,
        with whatever content."""
        if self.folder:
            return self.folder.create_whole(values)
        return [key for key, value in values.items() if not self.put_new(key, value)]

    def delete(self, key: str) -> None:
        if self.folder:
            return self.folder.delete_sync(key)
        return _run(self.zarr_store.delete(key))

    def sweep(self, units: Iterable[int]) -> None:
        """Removes files that runs were writing when they were killed, of the store and of these units; an object store
        has none."""
        if self.folder:
            self.folder.sweep(units)

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
            self.folder.flush_deleted(keys)

    def exists(self, key: str) -> bool:
        return self.folder.is_file(key) if self.folder else _run(self.zarr_store.exists(key))

    def stamp(self, key: str) -> object:
        """What changes when the content of `key` does; None: that is not known, or it is not there."""
        return self.folder.stamp(key) if self.folder else None

    def list(self, prefix: str) -> list[str]:
        """Every key that lies below `prefix`, sorted."""
        if self.folder:
            return self.folder.keys(prefix)
        return _run(_collect(self.zarr_store, prefix))

    def first(self, wanted: Callable[[str], bool]) -> str | None:
        """Some key that is wanted; looks no further than that."""
        return _run(_first(self.zarr_store, wanted))


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    return sync(work)


def _as_buffer(value: bytes) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(value)


async def _collect(store: Store, prefix: str) -> list[str]:
    return sorted([key async for key in store.list_prefix(prefix)])


async def _first(store: Store, wanted: Callable[[str], bool]) -> str | None:
    async for key in store.list_prefix(""):
        if wanted(key):
            return key
    return None


def _open_folder(path: Path, mode: str) -> Store:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"store {path}: is a file; expected a folder")
    if mode == "w":
        make_root(path)
    if not path.exists():
        raise FileNotFoundError(f"store {path}: no such folder")
    if mode != "r" and not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"store {path}: the folder is read-only; expected one that can be written")
    return DurableLocalStore(path, read_only=mode == "r")
