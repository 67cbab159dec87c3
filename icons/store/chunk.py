"""A chunk as zarr writes it where there is no compressor: the numbers as they lie in memory, then their crc32c.

Read and written without zarr, which copies a chunk twice each way: that was most of the time that storing took, and the
status of seven million rows is thousands of small chunks. The bytes on the disk are zarr's either way.
"""

import sys
from collections.abc import Callable, Sequence

import google_crc32c
import numpy as np

CHECKSUM_BYTES = 4
NATIVE = sys.byteorder == "little"  # as on the disk


def chunk_key(name: str, unit: int, ndim: int) -> str:
    """Where the chunk of a unit lies; arrays are cut into chunks along their rows only.

    >>> chunk_key("gradients", 3, 2)
    'gradients/c/3/0'
    """
    return "/".join([name, "c", str(unit), *["0"] * (ndim - 1)])


def status_key_of(key: str) -> str | None:
    """The chunk of `status` that says whether this chunk was written; None: the key is not such a chunk's.

    >>> status_key_of("gradients/c/3/0"), status_key_of("status/c/3"), status_key_of("norm/zarr.json")
    ('status/c/3', None, None)
    """
    parts = key.split("/")
    if len(parts) < 3 or parts[1] != "c" or parts[0] == "status":
        return None
    return chunk_key("status", int(parts[2]), 1) if parts[2].isdecimal() else None


def check_unwritten(key: str, exists: Callable[[str], bool]) -> None:
    """Called for a chunk that is not there: its rows read as the fill value only where nobody has written them.

    Raises:
        ValueError: the chunk's unit is finished.
    """
    status = status_key_of(key)
    if status is not None and exists(status):
        raise ValueError(missing(key))


def missing(key: str) -> str:
    return f"{key}: is missing, and its unit is finished"


def to_parts(values: np.ndarray, dtype: np.dtype) -> list[bytes | memoryview]:
    """A chunk's bytes in two pieces, numbers and checksum, without copying the numbers.

    >>> [bytes(part) for part in to_parts(np.array([1, 2]), np.dtype(np.uint8))]
    [b'\\x01\\x02', b'R\\x9f\\xf8\\x03']
    """
    numbers = np.ascontiguousarray(values, dtype=dtype).reshape(-1).view(np.uint8)
    return [numbers.data, google_crc32c.value(numbers).to_bytes(CHECKSUM_BYTES, "little")]


def num_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    """Bytes of a whole chunk with its checksum."""
    return int(np.prod(shape)) * dtype.itemsize + CHECKSUM_BYTES


def from_bytes(content: np.ndarray, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """The numbers of a chunk, in the memory of `content` (`[bytes]` uint8).

    Raises:
        ValueError: another number of bytes, or another checksum than these numbers have.

    >>> from_bytes(np.frombuffer(b"\\x01\\x02R\\x9f\\xf8\\x03", np.uint8), (2,), np.dtype(np.uint8))
    array([1, 2], dtype=uint8)
    """
    if len(content) != num_bytes(shape, dtype):
        raise ValueError(f"got {len(content)} bytes; expected {num_bytes(shape, dtype)}")
    numbers = content[:-CHECKSUM_BYTES]
    stated, computed = int.from_bytes(content[-CHECKSUM_BYTES:].tobytes(), "little"), google_crc32c.value(numbers)
    if stated != computed:
        raise ValueError(f"checksum: got {computed:#010x}; expected {stated:#010x}")
    return numbers.view(dtype).reshape(shape)
