"""A unit's digest: the checksums of its chunks by array, in a file of its own, `status/digest/<unit>`.

A chunk's checksum says that the chunk is whole, and not whose it is: the chunks of two units, or of `norm` and `loss`,
may have been swapped. The digest binds each to its array and its place. It is written with the rows, and so before the
unit's `status`.
"""

import json
from collections.abc import Mapping

import numpy as np

from icons.store.chunk import CHECKSUM_BYTES

_PREFIX = "status/digest/"
SINCE_FORMAT = 2


def digest_key(unit: int) -> str:
    return f"{_PREFIX}{unit}"


def to_bytes(checksums: Mapping[str, str]) -> bytes:
    return json.dumps(dict(sorted(checksums.items()))).encode()


def from_bytes(content: bytes | None) -> dict[str, str] | None:
    """Array -> checksum; None for what is no digest."""
    try:
        checksums = json.loads(content or b"")
    except ValueError:
        return None
    return checksums if isinstance(checksums, dict) else None


def stated(chunk: np.ndarray | bytes | memoryview) -> str:
    """The checksum with which a chunk, as it lies on the disk, ends."""
    return bytes(chunk[-CHECKSUM_BYTES:]).hex()
