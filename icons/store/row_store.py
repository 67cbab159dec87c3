"""RowStore: what gradient and score stores share: a Zarr group whose rows are written unit by unit, status last."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.registry import get_codec_class
from zarr.storage import MemoryStore

from icons.batch import Status
from icons.partition import Partition
from icons.store.manifest import plain
from icons.store.storage import PARTIAL, Storage

Kind = TypeVar("Kind", bound="RowStore")
FORMAT = 1
READABLE_STATUS = {str(int(status)): status.name.lower() for status in Status}
# the CF convention's words for the same, which xarray shows
FLAGS: dict[str, Any] = {
    "flag_values": [int(status) for status in Status],
    "flag_meanings": " ".join(status.name.lower() for status in Status),
}


@dataclass(frozen=True)
class Column:
    """One array of a store: rows first.

    Attributes:
        dtype: as numpy names it.
        fill: what an unwritten row reads as.
        dimensions: names after the first, with their lengths.
        codec: a compressor for the chunks; None: none.
    """

    dtype: str
    fill: float | int
    dimensions: tuple[tuple[str, int], ...] = ()
    codec: Mapping[str, Any] | None = None


class RowStore:
    """A store opened or created; subclasses name the arrays. Use `open` and `create`, not the constructor."""

    KIND = ""

    def __init__(self, storage: Storage, group: zarr.Group) -> None:
        self.storage, self.group = storage, group
        self.path, self.mode = storage.path, storage.mode
        self.manifest: dict[str, Any] = dict(group.attrs["icons"])  # type: ignore[arg-type]
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
    def _create(
        cls: type[Kind],
        path: str | Path,
        partition: Partition,
        columns: Mapping[str, Column],
        manifest: Mapping[str, Any],
        attributes: Mapping[str, Any] | None = None,
    ) -> Kind:
        storage = Storage(path, "w")
        if storage.exists("zarr.json"):
            raise FileExistsError(f"store {path}: exists already; expected a new place, or open it to go on")
        if foreign := storage.first(lambda key: not is_of_store(key, columns)):
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
        try:
            return np.asarray(self.status[:], dtype=np.uint8)
        except (ValueError, RuntimeError) as error:
            raise self.damaged("status", error) from error

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
        if not self.storage.exists(f"status/c/{unit}"):
            return False
        return bool((np.asarray(self.status[rows.start : rows.stop]) != Status.NOT_WRITTEN).all())

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

    def write_columns(self, units: Mapping[int, Mapping[str, np.ndarray]]) -> None:
        """Writes units: their arrays in the given order, then, once these are durable, each unit's `status`.

        Several at a time, because making files durable is what costs. A unit that was written is first unwritten.

        Raises:
            ValueError: a shape is not that of the unit, or an array is missing or unknown.
            FileNotFoundError: the store has vanished.
        """
        for unit, values in units.items():
            self.check_values(unit, values)
        if not self.storage.exists("zarr.json"):
            raise FileNotFoundError(
                f"store {self.path}: has vanished while it was being written; put it back, or start anew"
            )
        self.unwrite(units)
        for unit, values in units.items():
            for name in [name for name in values if name != "status"]:
                self.write_chunk(name, unit, values[name])
        self.storage.flush()
        for unit, values in units.items():
            self.write_chunk("status", unit, values["status"])

    def write_chunk(self, name: str, unit: int, values: np.ndarray) -> None:
        """One chunk of one array. Without a compressor it is the numbers and their checksum, written as they lie in
        memory: zarr would copy them twice, which is most of the time that storing takes. The same bytes either way.
        """
        array, rows = self.arrays[name], self.partition.unit_rows(unit)
        if len(array.compressors) > 1 or len(rows) < array.chunks[0] or sys.byteorder != "little":
            array[rows.start : rows.stop] = values
            return
        numbers = np.ascontiguousarray(values, dtype=array.dtype).reshape(-1).view(np.uint8)
        checksum = google_crc32c.value(numbers).to_bytes(4, "little")
        self.storage.put_parts("/".join([name, "c", str(unit), *["0"] * (array.ndim - 1)]), [numbers.data, checksum])

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
    assert isinstance(found, zarr.Array)
    return found.with_config({"write_empty_chunks": True})


def documents(columns: Mapping[str, Column], partition: Partition, attributes: dict[str, Any]) -> dict[str, bytes]:
    """The metadata files of a store: name -> content, the group's own last."""
    memory: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(memory), zarr_format=3, attributes=attributes)
    for name, column in columns.items():
        lengths = [length for _, length in column.dimensions]
        compressors: list[Any] = [Crc32cCodec()]  # last: of the bytes as they lie on the disk
        if column.codec is not None:
            compressors.insert(0, get_codec_class(column.codec["name"]).from_dict(dict(column.codec)))
        group.create_array(
            name,
            shape=(partition.num_rows, *lengths),
            chunks=(partition.chunk_rows, *(max(1, length) for length in lengths)),
            dtype=column.dtype,
            serializer=BytesCodec(endian=None if np.dtype(column.dtype).itemsize == 1 else "little"),
            compressors=compressors,
            fill_value=np.dtype(column.dtype).type(column.fill),
            dimension_names=("row", *(dimension for dimension, _ in column.dimensions)),
            attributes=FLAGS if name == "status" else {},
        )
    return {key: memory[key].to_bytes() for key in sorted(memory, key=lambda key: (key == "zarr.json", key))}


def stored_kind(storage: Storage) -> str | None:
    """Which kind of store lies there; None: a Zarr group that icons has not made.

    Raises:
        FileNotFoundError: no Zarr group.
        ValueError: a damaged one.
    """
    text = storage.get("zarr.json")
    if text is None:
        raise FileNotFoundError(f"store {storage.path}: has no zarr.json; expected a store made by icons")
    try:
        manifest = json.loads(text).get("attributes", {}).get("icons")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"store {storage.path}: zarr.json is damaged ({error}); expected JSON: restore it") from error
    return manifest.get("kind") if isinstance(manifest, Mapping) else None


def article(kind: str | None) -> str:
    return "no icons store" if kind is None else f"a {kind} store"


def parse_codec(codec: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A codec by name (`zstd`), as JSON, or as zarr has it; any codec that zarr or numcodecs registers.

    Raises:
        ValueError: no such codec.

    >>> parse_codec("zstd")
    {'name': 'zstd', 'configuration': {}}
    """
    if codec is None:
        return None
    found = json.loads(codec) if isinstance(codec, str) and codec.startswith("{") else codec
    found = {"name": found} if isinstance(found, str) else dict(found)
    try:
        get_codec_class(found["name"])
    except KeyError as error:
        raise ValueError(
            f"codec {codec!r}: unknown to zarr; expected a name such as zstd, gzip, blosc, numcodecs.lz4, or JSON with "
            "name and configuration"
        ) from error
    return {"name": found["name"], "configuration": found.get("configuration", {})}
