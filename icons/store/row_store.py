"""RowStore: what gradient and score stores share: a Zarr group whose rows are written unit by unit, status last."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr

from icons.agreement import IMAGE_FILES, PLACES, STATUSES, plain
from icons.batch import Status
from icons.partition import Partition
from icons.store import unit_digest
from icons.store.chunk import chunk_key
from icons.store.chunks import Chunks
from icons.store.file import Guard, nothing, vanished
from icons.store.foreign import check_manifest
from icons.store.former import article, discard, is_of_store, stored_kind
from icons.store.layout import READABLE_STATUS, Column, check_layout, documents, group_array
from icons.store.manifest import StoreManifest
from icons.store.storage import Storage

Kind = TypeVar("Kind", bound="RowStore")
_FORMAT = 2
_READABLE_FORMATS = (1, 2)
"""1 has neither digests of units nor the layout among its attributes."""
_AMENDED = {*PLACES, "batches", IMAGE_FILES, "num_validation", STATUSES, "warnings"}
"""Entries of a manifest, and of those in it, that runs may change while others write."""


class RowStore:
    """A store opened or created; subclasses name the arrays. Use `open` and `create`, not the constructor."""

    KIND = ""

    def __init__(self, storage: Storage, group: zarr.Group) -> None:
        self.storage, self.group = storage, group
        self.path, self.mode = storage.path, storage.mode
        self.manifest = check_manifest(group.attrs["icons"], self.path)
        self.arrays = {name: group_array(group, name, self.path) for name in self.manifest["arrays"]}
        self.status = self.arrays["status"]
        self.partition = Partition(self.status.shape[0], self.status.chunks[0])
        self.chunks = Chunks(storage, self.arrays, self.partition)
        self.stamp: object = None  # of the group's file, when it was last found to be this store's

    @classmethod
    def open(cls: type[Kind], path: str | Path, mode: str = "r") -> Kind:
        """Opens an existing store: reads its metadata, a few small files whatever the number of rows.

        Args:
            path: folder or URL.
            mode: "r" or "r+".

        Raises:
            FileNotFoundError: nothing there, or no store of this kind.
            ValueError: a store of another kind, or of a format that this version does not know.
        """
        storage = Storage(path, mode)
        kind = stored_kind(storage)
        if kind != cls.KIND:
            raise ValueError(f"store {path}: is {article(kind)}; expected a {cls.KIND} store made by icons")
        group = zarr.open_group(storage.zarr_store, mode="r" if mode == "r" else "r+", zarr_format=3)
        written: Any = dict(group.attrs["icons"]).get("format")  # type: ignore[arg-type]
        if written not in _READABLE_FORMATS:
            raise ValueError(f"store {path}: has format {written!r}; expected {_FORMAT}: read it with a newer version")
        check_layout(storage)
        return cls(storage, group)

    @classmethod
    def taken_up(
        cls: type[Kind],
        path: str | Path,
        check: Callable[[Kind], None],
        create: Callable[[], object],
        overwrite: bool = False,
    ) -> Kind:
        """The store at `path` to go on with, made if there is none.

        Args:
            path: folder or URL.
            check: raises ValueError unless the run may go on with the store.
            create: makes it.
            overwrite: take away a store that the run may not go on with.

        Raises:
            ValueError: the store there is another, and not `overwrite`.
        """
        try:
            store = cls.open(path, mode="r+")
            check(store)
            return store
        except FileNotFoundError:
            pass
        except ValueError:
            if not overwrite:
                raise
            discard(Storage(path, "r+"))
        with suppress(FileExistsError):  # another run was faster
            create()
        store = cls.open(path, mode="r+")
        check(store)
        return store

    @classmethod
    def _create(
        cls: type[Kind],
        path: str | Path,
        partition: Partition,
        columns: Mapping[str, Column],
        manifest: Mapping[str, Any],
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Kind:
        storage = Storage(path, "w")
        if storage.exists("zarr.json"):
            raise FileExistsError(f"store {path}: exists already; expected a new place, or open it to go on")
        if not overwrite and (foreign := storage.first(lambda key: not is_of_store(key, columns))):
            raise ValueError(
                f"store {path}: holds {foreign}, which no such store has; expected a new or empty place, or a store: "
                "nothing there was touched"
            )
        names = {"icons_status": READABLE_STATUS}
        made = {"format": _FORMAT, "kind": cls.KIND, "arrays": [*columns], **plain(manifest)}
        whole = {"icons": made, **names, **plain(attributes or {})}
        # Several runs may create the store at once: the first one's files stay. The group's own file comes last, so
        # that whoever finds it finds a whole store, after a loss of power as well.
        made_files = documents(columns, partition, whole)
        group_file = made_files.pop("zarr.json")
        for key in storage.put_all_new(made_files):
            if storage.get(key) != made_files[key]:
                raise ValueError(
                    f"store {path}: {key} is from another run with other settings that did not finish creating the "
                    "store; expected a new or empty place: delete it, or take another"
                )
        storage.flush()
        storage.put_all_new({"zarr.json": group_file})
        storage.flush()
        return cls.open(path, mode="r+")

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to another process as its place, and is opened anew there."""
        return type(self).open, (self.path, self.mode)

    @property
    def facts(self) -> StoreManifest:
        """What this version reads of `manifest`, typed; raises ValueError for an entry of another type."""
        return StoreManifest.read(self.manifest, f"store {self.path}")

    @property
    def num_rows(self) -> int:
        return self.partition.num_rows

    def amend(self, **entries: Any) -> None:
        """Sets entries of the manifest, here and in the store."""
        document = json.loads(self.storage.get("zarr.json") or b"")
        document["attributes"]["icons"] |= plain(entries)
        self.storage.put("zarr.json", json.dumps(document, indent=2).encode())
        self.storage.flush()
        self.manifest |= plain(entries)

    def check_same(self) -> None:
        """Called before something is written, and after something was read: another run may have been told to replace
        the store (`--overwrite`), and rows of one must not get into the other.

        Raises:
            FileNotFoundError: the store has vanished.
            ValueError: another one is in its place, made from something else.
        """
        stamp = self.storage.stamp("zarr.json")
        if stamp is not None and stamp == self.stamp:
            return
        text = self.storage.get("zarr.json")
        if text is None:
            raise vanished(self.path)
        if _lasting(json.loads(text)["attributes"].get("icons")) != _lasting(plain(self.manifest)):
            raise ValueError(
                f"store {self.path}: another run has replaced it, with other settings, meanwhile; give the place that "
                "you mean, and run the same line again"
            )
        self.stamp = stamp

    def statuses(self) -> np.ndarray:
        """The status of every row, `[N]` uint8."""
        return self.stored("status", slice(None))

    def status_digest(self) -> str:
        """SHA-256 (16 hex digits) of every row's status: what was made from these rows is stale when it changes."""
        return hashlib.sha256(self.statuses().tobytes()).hexdigest()[:16]

    def missing(self) -> list[int]:
        """Units with a row that is neither done nor failed, ascending."""
        empty = np.flatnonzero(self.statuses() == Status.NOT_WRITTEN)
        return np.unique(empty // self.partition.chunk_rows).tolist()

    def damaged(self, what: str, error: Exception) -> ValueError:
        return ValueError(
            f"store {self.path}: {what} cannot be read, a chunk is damaged or missing ({error}); run `icons verify "
            f"{self.path} --repair`, and then the line that made the store"
        )

    def is_written(self, unit: int) -> bool:
        """Whether every row of a unit is done or failed; reads one small chunk."""
        if not self.storage.exists(chunk_key("status", unit, 1)):
            return False
        rows = self.partition.unit_rows(unit)
        return bool((self.stored("status", slice(rows.start, rows.stop)) != Status.NOT_WRITTEN).all())

    def failed(self) -> dict[Status, np.ndarray]:
        """The failed rows by reason, ascending; only reasons that occur."""
        statuses = self.statuses()
        codes = [code for code in np.unique(statuses).tolist() if code > Status.DONE]
        if unknown := [code for code in codes if code not in set(Status)]:
            raise ValueError(
                f"store {self.path}: rows have the status {unknown[0]}, which this version does not know; expected one "
                f"of {', '.join(f'{int(code)} ({code.name.lower()})' for code in Status)}: read it with the version "
                "that wrote it"
            )
        return {Status(code): np.flatnonzero(statuses == code) for code in codes}

    def failed_units(self, statuses: np.ndarray | None = None) -> list[int]:
        """Units with a failed row, ascending; by what `statuses` has found, if that is given."""
        failed = (self.statuses() if statuses is None else statuses) > Status.DONE
        return np.unique(np.flatnonzero(failed) // self.partition.chunk_rows).tolist()

    def counts(self) -> dict[str, int]:
        """Rows `done`, `failed` and `missing`."""
        statuses = self.statuses()
        done, missing = int((statuses == Status.DONE).sum()), int((statuses == Status.NOT_WRITTEN).sum())
        return {"done": done, "failed": len(statuses) - done - missing, "missing": missing}

    def num_bytes(self) -> int:
        """Bytes of all arrays, uncompressed, once everything is written."""
        return sum(int(array.nbytes) for array in self.arrays.values())

    def write_columns(self, unit: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes a unit, finished or not: its arrays in the given order, then, once these are durable, its `status`.

        For a store that nobody else writes; where others may, `UnitWriter` takes a lease first. Raises as `write_rows`.
        """
        self.check_values(unit, values)
        self.unwrite([unit])
        self.write_rows(unit, values)
        self.commit({unit: values["status"]})

    def write_rows(self, unit: int, values: Mapping[str, np.ndarray], guard: Guard = nothing) -> None:
        """Writes the arrays of an unfinished unit except `status`: until `commit` it counts as not written.

        Args:
            unit: which.
            values: its arrays, `status` among them.
            guard: called before the files are seen; raises when the unit is another run's now, or finished.

        Raises:
            ValueError: a shape is not that of the unit, or an array is missing or unknown.
            FileNotFoundError, ValueError: as `check_same`.
            LostUnit: the guard has objected.
        """
        self.check_values(unit, values)
        self.check_same()
        rows = {name: value for name, value in values.items() if name != "status"}
        self.chunks.write(unit, rows, values["status"] if self.has_digests else None, guard)

    def commit(self, statuses: Mapping[int, np.ndarray], guards: Mapping[int, Guard] | None = None) -> list[int]:
        """Makes all that was written durable, and then writes the `status` of these units; several at a time, because
        it takes a disk hardly longer. The units to which no guard has objected."""
        keys = {chunk_key("status", unit, 1): unit for unit in statuses}
        parts = {key: self.chunks.parts("status", statuses[unit]) for key, unit in keys.items()}
        guarded = {key: (guards or {}).get(unit, nothing) for key, unit in keys.items()}
        return [keys[key] for key in self.storage.put_whole(parts, guarded)]

    @property
    def has_digests(self) -> bool:
        return int(self.manifest["format"]) >= unit_digest.SINCE_FORMAT

    def stored(self, name: str, rows: slice) -> np.ndarray:
        """Consecutive rows of one array as they are stored; rows not written read as its fill value.

        Costs the chunks that hold these rows, whatever the number of rows of the store.

        Raises:
            ValueError: a chunk is damaged, or missing although its unit is finished.
        """
        try:
            return self.chunks.read(name, rows)
        except (ValueError, RuntimeError) as error:
            raise self.damaged(name, error) from error

    def check_values(self, unit: int, values: Mapping[str, np.ndarray]) -> None:
        if set(values) != set(self.arrays):
            raise ValueError(f"store {self.path}, unit {unit}: got {sorted(values)}; expected {sorted(self.arrays)}")
        for name, value in values.items():
            expected = (len(self.partition.unit_rows(unit)), *self.arrays[name].shape[1:])
            if value.shape != expected:
                raise ValueError(f"store {self.path}, unit {unit}: {name} has shape {value.shape}; expected {expected}")

    def unwrite(self, units: Iterable[int]) -> None:
        """Marks units as not written; their rows stay until they are written again."""
        written = [key for key in (f"status/c/{unit}" for unit in units) if self.storage.exists(key)]
        for key in written:
            self.storage.delete(key)
        self.storage.flush_deleted(written)


def _lasting(entry: Any) -> Any:
    """A manifest, or an entry of one, without what may change while a store is written."""
    if isinstance(entry, Mapping):
        return {name: _lasting(value) for name, value in entry.items() if name not in _AMENDED}
    return [_lasting(value) for value in entry] if isinstance(entry, list) else entry
