"""Manifests: what a store was made from, and whether two of them agree."""

import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

LATER = ("reader",)  # which stores of former versions lack: nothing is known of them
DECISIVE = ("icons-lightning", "torch", "transformers", "peft", "lightning", "zarr", "numpy")


def check_compatible(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    fields: Iterable[str],
    what_a: str = "the store",
    what_b: str = "this run",
) -> None:
    """Compares two manifests in the given fields; `projector` compares all of it, `data.fingerprint` one entry.

    Raises:
        ValueError: the first difference, with its field and both values.

    >>> check_compatible({"dtype": "int8"}, {"dtype": "int8"}, ["dtype"])
    """
    for field in fields:
        if field in LATER and None in (lookup(a, field), lookup(b, field)):
            continue
        for name, left, right in differences(field, lookup(plain(a), field), lookup(plain(b), field)):
            raise ValueError(
                f"{name}: {what_a} has {left!r}, {what_b} has {right!r}; expected both to be the same: "
                "mend one, or use another store"
            )


def lookup(manifest: Any, field: str) -> Any:
    for part in field.split("."):
        manifest = manifest.get(part) if isinstance(manifest, Mapping) else None
    return manifest


def differences(name: str, left: Any, right: Any) -> Sequence[tuple[str, Any, Any]]:
    """The leaves in which two values differ."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        keys = [*left, *(key for key in right if key not in left)]
        return [found for key in keys for found in differences(f"{name}.{key}", left.get(key), right.get(key))]
    return [] if left == right else [(name, left, right)]


def plain(value: Any) -> Any:
    """A manifest as JSON has it: what is compared later is what was saved."""
    return json.loads(json.dumps(value, default=str))


def versions(*names: str) -> dict[str, str | None]:
    """Installed versions of packages (default: those that decide about numbers); None for one that is not installed, as
    this one when it runs from its sources."""
    found: dict[str, str | None] = dict.fromkeys(names or DECISIVE)
    for name in found:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
