"""RowStore: what gradient and score stores share: a Zarr group whose rows are written unit by unit, status last."""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr

from icons.batch import Status
from icons.partition import Partition
from icons.store.chunk import chunk_key, from_bytes, to_parts
from icons.store.folder import PARTIAL, DurableLocalStore, vanished
from icons.store.foreign import check_array, check_manifest, is_plain
from icons.store.former import discard, stored_kind
from icons.store.layout import READABLE_STATUS, Column, documents
from icons.store.manifest import plain
from icons.store.storage import Storage

Kind = TypeVar("Kind", bound="RowStore")
FORMAT = 1


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
        if (written := dict(group.attrs["icons"]).get("format")) != FORMAT:  # type: ignore[arg-type]
            raise ValueError(f"store {path}: has format {written!r}; expected {FORMAT}: read it with a newer version")
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
        made = {"format": FORMAT, "kind": cls.KIND, "arrays": [*columns], **plain(manifest)}
        whole = {"icons": made, **names, **plain(attributes or {})}
        for key, document in documents(columns, partition, whole).items():
            # Several runs may create the store at once: the first one's files stay. The group's own file comes last, so
            # that whoever finds it finds a whole store.
            if not storage.put_new(key, document) and key != "zarr.json" and storage.get(key) != document:
                raise ValueError(
                    f"store {path}: {key} is from another run with other settings that did not finish creating the "
                    "store; expected a new or empty place: delete it, or take another"
                )
        storage.flush()
        return cls.open(path, mode="r+")

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to another process as its place, and is opened anew there."""
        return type(self).open, (self.path, self.mode)

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

    def statuses(self) -> np.ndarray:
        """The status of every row, `[N]` uint8."""
        return self.stored("status", slice(None))

    def missing(self) -> list[int]:
        """Units with a row that is neither done nor failed, ascending."""
        empty = np.flatnonzero(self.statuses() == Status.NOT_WRITTEN)
        return np.unique(empty // self.partition.chunk_rows).tolist()

    def damaged(self, what: str, error: Exception) -> ValueError:
        return ValueError(
            f"store {self.path}: {what} cannot be read, a chunk is damaged ({error}); run `icons verify {self.path} "
            "--repair`, and then the line that made the store"
        )

    def is_written(self, unit: int) -> bool:
        """Whether every row of a unit is done or failed; reads one small chunk."""
        rows = self.partition.unit_rows(unit)
        return bool((self.stored("status", slice(rows.start, rows.stop)) != Status.NOT_WRITTEN).all())

    def failed(self) -> dict[Status, np.ndarray]:
        """The failed rows by reason, ascending; only reasons that occur."""
        statuses = self.statuses()
        codes = [code for code in np.unique(statuses).tolist() if code > Status.DONE]
        return {Status(code): np.flatnonzero(statuses == code) for code in codes}

    def failed_units(self) -> list[int]:
        """Units with a failed row, ascending."""
        return np.unique(np.flatnonzero(self.statuses() > Status.DONE) // self.partition.chunk_rows).tolist()

    def counts(self) -> dict[str, int]:
        """Rows `done`, `failed` and `missing`."""
        statuses = self.statuses()
        done, missing = int((statuses == Status.DONE).sum()), int((statuses == Status.NOT_WRITTEN).sum())
        return {"done": done, "failed": len(statuses) - done - missing, "missing": missing}

    def num_bytes(self) -> int:
        """Bytes of all arrays, uncompressed, once everything is written."""
        return sum(int(array.nbytes) for array in self.arrays.values())

    def write_columns(self, unit: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes a unit: its arrays in the given order, then, once these are durable, its `status`.

        Raises:
            ValueError: a shape is not that of the unit, or an array is missing or unknown.
            FileNotFoundError: the store has vanished.
        """
        self.write_rows(unit, values)
        self.commit({unit: values["status"]})

    def write_rows(self, unit: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes the arrays of a unit except `status`: until `commit` the unit counts as not written.

        Raises:
            ValueError: a shape is not that of the unit, or an array is missing or unknown.
            FileNotFoundError: the store has vanished.
        """
        self.check_values(unit, values)
        if not self.storage.exists("zarr.json"):
            raise vanished(self.path)
        self.unwrite([unit])
        for name, value in values.items():
            if name != "status":
                self.write_chunk(name, unit, value)

    def commit(self, statuses: Mapping[int, np.ndarray]) -> None:
        """Makes all that was written durable, and then writes the `status` of these units; several at a time, because
        it takes a disk hardly longer."""
        self.storage.flush()
        for unit, status in statuses.items():
            self.write_chunk("status", unit, status)

    def write_chunk(self, name: str, unit: int, values: np.ndarray) -> None:
        array, rows = self.arrays[name], self.partition.unit_rows(unit)
        if not is_plain(array) or len(rows) < array.chunks[0]:
            array[rows.start : rows.stop] = values
        else:
            self.storage.put_parts(chunk_key(name, unit, array.ndim), to_parts(values, array.dtype))

    def stored(self, name: str, rows: slice) -> np.ndarray:
        """Consecutive rows of one array as they are stored; rows not written read as its fill value.

        Costs the chunks that hold these rows, whatever the number of rows of the store.

        Raises:
            ValueError: a chunk is damaged.
        """
        array, (start, stop, step) = self.arrays[name], rows.indices(self.num_rows)
        assert step == 1
        units = range(start // self.partition.chunk_rows, -(-stop // self.partition.chunk_rows))
        try:
            folder = self.storage.folder
            if (
                folder is None or not is_plain(array) or array.chunks[0] != self.partition.chunk_rows
            ):  # an object store answers zarr many chunks at once
                return np.asarray(array[start:stop])
            if len(units) == 1:
                first = self.partition.unit_rows(units[0]).start
                chunk = self.read_chunk(folder, name, units[0])
                found = chunk[start - first : stop - first]
                return found if 2 * len(found) > len(chunk) else found.copy()  # a few rows do not keep a chunk alive
            found = np.empty((max(0, stop - start), *array.shape[1:]), array.dtype)
            for unit in units:
                of_unit = self.partition.unit_rows(unit)
                low, high = max(start, of_unit.start), min(stop, of_unit.stop)
                part = self.read_chunk(folder, name, unit)
                found[low - start : high - start] = part[low - of_unit.start : high - of_unit.start]
            return found
        except (ValueError, RuntimeError) as error:
            raise self.damaged(name, error) from error

    def read_chunk(self, folder: DurableLocalStore, name: str, unit: int) -> np.ndarray:
        """A whole chunk, rows beyond the last one included."""
        array = self.arrays[name]
        key = chunk_key(name, unit, array.ndim)
        content = folder.read_array(key)
        if content is None:
            return np.full(array.chunks, array.fill_value, array.dtype)
        try:
            return from_bytes(content, array.chunks, array.dtype)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

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


def is_of_store(key: str, columns: Iterable[str]) -> bool:
    """Whether a file may have been left by a run that was stopped while it created such a store."""
    return key == "zarr.json" or key.split("/")[0] in columns or key.endswith(PARTIAL)


def group_array(group: zarr.Group, name: str, path: str) -> zarr.Array[Any]:
    """An array of the group, set to write chunks even if all of their values are the fill value."""
    try:
        found = group[name]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"store {path}: {name}/zarr.json is missing or damaged ({error}); expected the file that `create` wrote: "
            "copy it from a store of the same shape, or compute the store anew"
        ) from error
    check_array(found, name, path)
    assert isinstance(found, zarr.Array)
    return found.with_config({"write_empty_chunks": True})


def article(kind: str | None) -> str:
    return "no icons store" if kind is None else f"a {kind} store"
