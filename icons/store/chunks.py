"""Chunks: the arrays of a store, read and written a unit at a time, by zarr only where there is a compressor."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import zarr

from icons.partition import Partition
from icons.store import unit_digest
from icons.store.chunk import check_unwritten, chunk_key, from_bytes, to_parts
from icons.store.file import Guard
from icons.store.folder import DurableLocalStore
from icons.store.foreign import is_plain
from icons.store.storage import Storage


class _Form(NamedTuple):
    """What zarr says of an array, which it works out anew whenever it is asked."""

    plain: bool
    shape: tuple[int, ...]
    dtype: np.dtype
    fill: Any


class Chunks:
    """The chunks of a store's arrays.

    Args:
        storage: where they lie.
        arrays: by name.
        partition: rows -> units, which are the chunks.
    """

    def __init__(self, storage: Storage, arrays: Mapping[str, zarr.Array[Any]], partition: Partition) -> None:
        self.storage, self.arrays, self.partition = storage, arrays, partition
        self.forms = {
            name: _Form(is_plain(array), array.chunks, array.dtype, array.fill_value) for name, array in arrays.items()
        }

    def key(self, name: str, unit: int) -> str:
        return chunk_key(name, unit, len(self.forms[name].shape))

    def write(self, unit: int, values: Mapping[str, np.ndarray], last: np.ndarray | None, guard: Guard) -> None:
        """Writes a unit's chunks.

        Args:
            unit: which.
            values: by array, in the order in which they are written.
            last: what `status` will be, for a digest that binds all of them; None: no digest.
            guard: called before the files are seen.
        """
        parts = {name: self.parts(name, rows) for name, rows in values.items() if self.forms[name].plain}
        checksums = {name: unit_digest.stated(of_chunk[-1]) for name, of_chunk in parts.items()}
        rows = self.partition.unit_rows(unit)
        for name in [name for name in values if name not in parts]:
            guard()
            self.arrays[name][rows.start : rows.stop] = values[name]
            checksums[name] = unit_digest.stated(self.storage.get(self.key(name, unit)) or b"")
        made = {self.key(name, unit): of_chunk for name, of_chunk in parts.items()}
        if last is not None:
            checksums["status"] = unit_digest.stated(self.parts("status", last)[-1])
            made[unit_digest.digest_key(unit)] = [unit_digest.to_bytes(checksums)]
        self.storage.put_together(made, guard)

    def parts(self, name: str, values: np.ndarray) -> list[bytes | memoryview]:
        """A whole chunk as it is written, numbers and checksum: behind the store's last row comes the fill value."""
        form = self.forms[name]
        if len(values) < form.shape[0]:
            rows, values = values, np.full(form.shape, form.fill, form.dtype)
            values[: len(rows)] = rows
        return to_parts(values, form.dtype)

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Consecutive rows of one array as they are stored; rows not written read as its fill value.

        Raises:
            ValueError, RuntimeError: a chunk is damaged, or missing although its unit is finished.
        """
        form, (start, stop, step) = self.forms[name], rows.indices(self.partition.num_rows)
        assert step == 1
        folder = self.storage.folder
        if folder is None or not form.plain or form.shape[0] != self.partition.chunk_rows:
            return np.asarray(self.arrays[name][start:stop])  # an object store answers zarr many chunks at once
        units = range(start // self.partition.chunk_rows, -(-stop // self.partition.chunk_rows))
        if len(units) == 1:
            first = self.partition.unit_rows(units[0]).start
            chunk = self._read_whole(folder, name, units[0])
            part = chunk[start - first : stop - first]
            return part if 2 * len(part) > len(chunk) else part.copy()  # a few rows do not keep a chunk alive
        values = np.empty((max(0, stop - start), *form.shape[1:]), form.dtype)
        for unit in units:
            of_unit = self.partition.unit_rows(unit)
            low, high = max(start, of_unit.start), min(stop, of_unit.stop)
            chunk = self._read_whole(folder, name, unit)
            values[low - start : high - start] = chunk[low - of_unit.start : high - of_unit.start]
        return values

    def _read_whole(self, folder: DurableLocalStore, name: str, unit: int) -> np.ndarray:
        """A whole chunk, rows beyond the last one included."""
        form, key = self.forms[name], self.key(name, unit)
        content = folder.read_array(key)
        if content is None:
            check_unwritten(key, folder.is_file)
            return np.full(form.shape, form.fill, form.dtype)
        try:
            return from_bytes(content, form.shape, form.dtype)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    def decoded(self, name: str, unit: int, content: np.ndarray) -> np.ndarray:
        """A whole chunk out of its bytes (`[bytes]` uint8); one with a compressor is read again, by zarr."""
        form = self.forms[name]
        if form.plain:
            return from_bytes(content, form.shape, form.dtype)
        rows = self.partition.unit_rows(unit)
        return np.asarray(self.arrays[name][rows.start : rows.stop])
