"""What a store consists of: its arrays, their chunks and codecs, as the metadata files that `create` writes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.registry import get_codec_class
from zarr.storage import MemoryStore

from icons.batch import Status
from icons.partition import Partition

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
