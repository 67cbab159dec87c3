"""Manifest: what a store, a folder or a selection says that it was made from and with, typed.

On disk it is a JSON object with the number of its format. What the code reads of it is read through a subclass, with
what former versions meant where they said nothing; entries that this version does not know stay in the object.
"""

import importlib.metadata
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

_DECISIVE = ("icons-lightning", "torch", "transformers", "peft", "lightning", "zarr", "numpy")
Kind = TypeVar("Kind", bound="Manifest")


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest states, typed. An entry that is missing, or null, has its default."""

    @classmethod
    def read(cls: type[Kind], manifest: Mapping[str, Any], where: object) -> Kind:
        """The entries of `manifest` that this class knows.

        Raises:
            ValueError: one has another type.
        """
        try:
            return msgspec.convert({key: value for key, value in manifest.items() if value is not None}, cls)
        except msgspec.ValidationError as error:
            raise ValueError(
                f"{where}: its manifest cannot be read ({error}); restore it, or read it with the version that wrote it"
            ) from error


class DataEntry(msgspec.Struct, frozen=True):
    """The data file that rows are of."""

    path: str = "?"
    num_rows: int | None = None
    fingerprint: str | None = None


def versions(*names: str) -> dict[str, str | None]:
    """Installed versions of packages (default: those that decide about numbers); None for one that is not installed, as
    this one when it runs from its sources."""
    installed: dict[str, str | None] = dict.fromkeys(names or _DECISIVE)
    for name in installed:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed
