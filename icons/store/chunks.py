"""Chunks: the arrays of a store, read and written a unit at a time, by zarr only where there is a compressor."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr

from icons.partition import Partition
from icons.store import unit_digest
from icons.store.chunk import check_unwritten, chunk_key, from_bytes, to_parts
from icons.store.file import Guard, nothing
from icons.store.folder import DurableLocalStore
from icons.store.foreign import is_plain
from icons.store.storage import Storage


class Chunks:
    """The chunks of a store's arrays.

    Args:
        storage: where they lie.
        arrays: by name.
        partition: rows -> units, which are the chunks.
    """

    def __init__(self, storage: Storage, arrays: Mapping[str, zarr.Array[Any]], partition: Partition) -> None:
        self.storage, self.arrays, self.partition = storage, arrays, partition

    def write(self, name: str, unit: int, values: np.ndarray, guard: Guard = nothing) -> str:
        """Writes one chunk; its checksum."""
        array, rows = self.arrays[name], self.partition.unit_rows(unit)
        key = chunk_key(name, unit, array.ndim)
        if is_plain(array):
            parts = self.parts(name, values)
            self.storage.put_parts(key, parts, guard)
            return unit_digest.stated(parts[-1])
        guard()
        array[rows.start : rows.stop] = values
        return unit_digest.stated(self.storage.get(key) or b"")

    def parts(self, name: str, values: np.ndarray) -> list[bytes | memoryview]:
        """A whole chunk as it is written, numbers and checksum: behind the store's last row comes the fill value."""
        array = self.arrays[name]
        if len(values) < array.chunks[0]:
            rows, values = values, np.full(array.chunks, array.fill_value, array.dtype)
            values[: len(rows)] = rows
        return to_parts(values, array.dtype)

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Consecutive rows of one array as they are stored; rows not written read as its fill value.

        Raises:
            ValueError, RuntimeError: a chunk is damaged, or missing although its unit is finished.
        """
        array, (start, stop, step) = self.arrays[name], rows.indices(self.partition.num_rows)
        assert step == 1
        folder = self.storage.folder
        if folder is None or not is_plain(array) or array.chunks[0] != self.partition.chunk_rows:
            return np.asarray(array[start:stop])  # an object store answers zarr many chunks at once
        units = range(start // self.partition.chunk_rows, -(-stop // self.partition.chunk_rows))
        if len(units) == 1:
            first = self.partition.unit_rows(units[0]).start
            chunk = self._read_whole(folder, name, units[0])
            part = chunk[start - first : stop - first]
            return part if 2 * len(part) > len(chunk) else part.copy()  # a few rows do not keep a chunk alive
        values = np.empty((max(0, stop - start), *array.shape[1:]), array.dtype)
        for unit in units:
            of_unit = self.partition.unit_rows(unit)
            low, high = max(start, of_unit.start), min(stop, of_unit.stop)
            chunk = self._read_whole(folder, name, unit)
            values[low - start : high - start] = chunk[low - of_unit.start : high - of_unit.start]
        return values

    def _read_whole(self, folder: DurableLocalStore, name: str, unit: int) -> np.ndarray:
        """A whole chunk, rows beyond the last one included."""
        array = self.arrays[name]
        key = chunk_key(name, unit, array.ndim)
        content = folder.read_array(key)
        if content is None:
            check_unwritten(key, folder.is_file)
            return np.full(array.chunks, array.fill_value, array.dtype)
        try:
            return from_bytes(content, array.chunks, array.dtype)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    def decoded(self, name: str, unit: int, content: np.ndarray) -> np.ndarray:
        """A whole chunk out of its bytes (`[bytes]` uint8); one with a compressor is read again, by zarr."""
        array = self.arrays[name]
        if is_plain(array):
            return from_bytes(content, array.chunks, array.dtype)
        rows = self.partition.unit_rows(unit)
        return np.asarray(array[rows.start : rows.stop])
