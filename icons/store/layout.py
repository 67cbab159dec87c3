"""What a store consists of: its arrays, their chunks and codecs, as the metadata files that `create` writes.

The group's attributes repeat what the arrays' own files say: a shape or a fill value that has been changed would give
rows that nobody wrote, and is found, refused, and restored from there.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.registry import get_codec_class
from zarr.storage import MemoryStore

from icons.batch import Status
from icons.partition import Partition
from icons.store.foreign import check_array
from icons.store.storage import Storage

_LAYOUT = "icons_layout"
READABLE_STATUS = {str(int(status)): status.name.lower() for status in Status}
# the CF convention's words for the same, which xarray shows
_FLAGS: dict[str, Any] = {
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


def documents(columns: Mapping[str, Column], partition: Partition, attributes: dict[str, Any]) -> dict[str, bytes]:
    """The metadata files of a store: name -> content, the group's own, which repeats the others, last."""
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
            attributes=_FLAGS if name == "status" else {},
        )
    layout = {name: json.loads(memory[f"{name}/zarr.json"].to_bytes()) for name in columns}
    group.update_attributes({_LAYOUT: layout})
    return {key: memory[key].to_bytes() for key in sorted(memory, key=lambda key: (key == "zarr.json", key))}


def check_layout(storage: Storage) -> None:
    """Refuses a store of which an array's file does not say what the store was made with.

    Raises:
        ValueError: the first such file, with both values.
    """
    for name, what in changed_arrays(storage).items():
        raise ValueError(
            f"store {storage.path}: {name}/zarr.json {what}: restore it with `icons verify {storage.path} --repair`, "
            "which touches no row"
        )


def changed_arrays(storage: Storage) -> dict[str, str]:
    """Arrays whose file is not the one that `create` wrote: name -> what is wrong with it."""
    changes: dict[str, str] = {}
    for name, made in _stated_layout(storage).items():
        text = storage.get(f"{name}/zarr.json")
        try:
            now = json.loads(text or b"null")
        except ValueError:
            now = None
        if not isinstance(now, dict):
            changes[name] = "is missing or damaged; expected the array's metadata"
            continue
        for entry in sorted({*now, *made} - {"attributes"}):
            if now.get(entry) != made.get(entry):
                said = f"has {entry} {now.get(entry)!r}; expected {made.get(entry)!r}, as the store was made"
                changes.setdefault(name, said)
    return changes


def restore_arrays(storage: Storage, names: Iterable[str]) -> None:
    """Writes the files of these arrays as the store was made; no chunk is touched."""
    layout = _stated_layout(storage)
    for name in names:
        storage.put(f"{name}/zarr.json", json.dumps(layout[name], indent=2).encode())
    storage.flush()


def _stated_layout(storage: Storage) -> dict[str, dict[str, Any]]:
    """Array -> its metadata as the store was made; empty for a store of format 1."""
    attributes = json.loads(storage.get("zarr.json") or b"{}").get("attributes", {})
    return dict(attributes.get(_LAYOUT) or {})


def group_array(group: zarr.Group, name: str, path: str) -> zarr.Array[Any]:
    """An array of the group, set to write chunks even if all of their values are the fill value."""
    try:
        array = group[name]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"store {path}: {name}/zarr.json is missing or damaged ({error}); expected the file that `create` wrote: "
            "copy it from a store of the same shape, or compute the store anew"
        ) from error
    check_array(array, name, path)
    assert isinstance(array, zarr.Array)
    return array.with_config({"write_empty_chunks": True})


def parse_codec(codec: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A codec by name (`zstd`), as JSON, or as zarr has it; any codec that zarr or numcodecs registers.

    Raises:
        ValueError: no such codec.

    >>> parse_codec("zstd")
    {'name': 'zstd', 'configuration': {}}
    """
    if codec is None:
        return None
    named = json.loads(codec) if isinstance(codec, str) and codec.startswith("{") else codec
    named = {"name": named} if isinstance(named, str) else dict(named)
    try:
        get_codec_class(named["name"])
    except KeyError as error:
        raise ValueError(
            f"codec {codec!r}: unknown to zarr; expected a name such as zstd, gzip, blosc, numcodecs.lz4, or JSON with "
            "name and configuration"
        ) from error
    return {"name": named["name"], "configuration": named.get("configuration", {})}
