"""What a store from elsewhere must be before it is read: its manifest, its shapes, and how its chunks are encoded."""

from collections.abc import Mapping
from typing import Any

import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from icons.store.chunk import NATIVE

_MAX_ROWS, _MAX_UNITS, _MAX_CHUNK_BYTES = 1 << 31, 1 << 26, 1 << 31
"""Beyond these a few bytes of metadata would ask for gigabytes of memory."""
_TABLES = ("adapter", "data", "model", "preprocessing", "projector", "settings", "versions")


def is_plain(array: zarr.Array[Any]) -> bool:
    """Whether a chunk is its rows' numbers as they lie in memory, then their crc32c, and nothing else."""
    codecs: Any = getattr(array.metadata, "codecs", ())
    if not NATIVE or array.chunks[1:] != array.shape[1:] or len(codecs) != 2:
        return False
    numbers, checksum = codecs
    if not isinstance(numbers, BytesCodec) or not isinstance(checksum, Crc32cCodec) or array.dtype.kind not in "fiu":
        return False
    return array.dtype.itemsize == 1 or (numbers.endian is not None and numbers.endian.value == "little")


def check_manifest(manifest: object, path: str) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        ValueError: an entry that every store has is missing, or one is of another kind.
    """
    if not isinstance(manifest, Mapping):
        raise ValueError(f"store {path}: its manifest is no table of entries; expected one made by icons")
    arrays = manifest.get("arrays")
    if not isinstance(arrays, list) or not all(isinstance(name, str) for name in arrays) or "status" not in arrays:
        raise ValueError(f"store {path}: its manifest names the arrays {arrays!r}; expected a list with status in it")
    for name in _TABLES:
        if not isinstance(manifest.get(name) or {}, Mapping):
            raise ValueError(f"store {path}: its manifest has {name} {manifest[name]!r}; expected a table of entries")
    return dict(manifest)


def check_array(array: object, name: str, path: str) -> None:
    """Refuses an array whose chunks would be looked for in the wrong place, or are larger than any that icons writes.

    Raises:
        ValueError: no array, other keys, shards, or too large.
    """
    if not isinstance(array, zarr.Array):
        raise ValueError(f"store {path}: {name} is no array; expected one, as icons writes it")
    encoding: Any = getattr(array.metadata, "chunk_key_encoding", None)
    usual = getattr(encoding, "name", "") == "default" and getattr(encoding, "separator", "") == "/"
    if array.shards is not None or not usual:
        raise ValueError(
            f"store {path}: {name} lies in shards, or under other keys than {name}/c/0; expected chunks as icons "
            "writes them: write the store anew without them"
        )
    rows, units = array.shape[0], -(-array.shape[0] // max(1, array.chunks[0]))
    size = array.dtype.itemsize
    for length in array.chunks:
        size *= length
    if rows > _MAX_ROWS or units > _MAX_UNITS or size > _MAX_CHUNK_BYTES:
        raise ValueError(
            f"store {path}: {name} has {rows:,} rows in chunks of {size:,} bytes; expected at most {_MAX_ROWS:,} rows, "
            f"{_MAX_UNITS:,} chunks and {_MAX_CHUNK_BYTES:,} bytes each"
        )
    if name == "status" and (array.ndim != 1 or array.dtype.name != "uint8" or not is_plain(array)):
        raise ValueError(
            f"store {path}: status is {array.ndim}-dimensional {array.dtype.name}, or compressed; expected one uint8 a "
            "row, with a checksum alone"
        )
