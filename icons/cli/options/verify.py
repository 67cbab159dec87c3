"""Options of `icons verify`."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Reads the whole store: metadata, checksums, missing and swapped chunks, rows against their status, NaN, zeros.

    $ icons verify train.zarr

    Exit status: 0 all is sound; 1 something is wrong (and was not repaired); 2 wrong usage.
    """

    positional: ClassVar = ("store",)
    store: str
    """gradient or score store: a folder, or a URL"""
    repair: bool = False
    """restore the metadata, and mark damaged units as not written: the line that made the store, run again, then
    computes just those"""
