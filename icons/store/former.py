"""What lies where a store is to be made or opened: which kind of store, or something else; and how it is taken away."""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from icons.store.file import PARTIAL
from icons.store.storage import Storage

log = logging.getLogger(__name__)


def stored_kind(storage: Storage) -> str | None:
    """Which kind of store lies there; None: a Zarr group that icons has not made.

    Raises:
        FileNotFoundError: no Zarr group.
        ValueError: a damaged one.
    """
    text = storage.get("zarr.json")
    if text is None:
        raise FileNotFoundError(f"store {storage.path}: has no zarr.json; expected a store made by icons")
    try:
        manifest = json.loads(text).get("attributes", {}).get("icons")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"store {storage.path}: zarr.json is damaged ({error}); expected JSON: restore it") from error
    facts = manifest if isinstance(manifest, Mapping) else {}
    log.debug("%s: kind %s, format %s, arrays %s", storage.path, *map(facts.get, ("kind", "format", "arrays")))
    return facts.get("kind")


def discard(storage: Storage) -> None:
    """Takes away a store, and nothing else that lies there: its group first, without which there is none."""
    try:
        document = json.loads(storage.get("zarr.json") or b"{}")
        names = document["attributes"]["icons"]["arrays"]
    except (ValueError, KeyError, TypeError, RecursionError):
        names = []
    storage.delete("zarr.json")
    for name in names:
        if re.fullmatch(r"\w+", str(name)):  # no way out of the folder
            for key in storage.list(f"{name}/"):
                storage.delete(key)


def holds_store(path: Path, kind: str) -> bool:
    """Whether a folder holds a store of this kind, or what is left of one that was not made to its end."""
    try:
        return stored_kind(Storage(path)) == kind
    except FileNotFoundError:
        return all(entry.is_dir() or PARTIAL in entry.name for entry in path.iterdir())
    except ValueError:
        return False


def is_of_store(key: str, columns: Iterable[str]) -> bool:
    """Whether a file may have been left by a run that was stopped while it created such a store."""
    return key == "zarr.json" or key.split("/")[0] in columns or key.endswith(PARTIAL)


def article(kind: str | None) -> str:
    return "no icons store" if kind is None else f"a {kind} store"
