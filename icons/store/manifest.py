"""Versions: of the packages that decide about a store's numbers."""

import importlib.metadata
from contextlib import suppress

DECISIVE = ("icons-lightning", "torch", "transformers", "peft", "lightning", "zarr", "numpy")


def versions(*names: str) -> dict[str, str | None]:
    """Installed versions of packages (default: those that decide about numbers); None for one that is not installed, as
    this one when it runs from its sources."""
    found: dict[str, str | None] = dict.fromkeys(names or DECISIVE)
    for name in found:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
