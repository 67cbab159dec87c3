"""An object store as zarr sees one: every error is one line, and a chunk that is missing is one too."""

import importlib
from typing import Any

from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import ObjectStore

from icons.store.chunk import missing, status_key_of


class CheckedObjectStore(ObjectStore[Any]):
    """zarr's ObjectStore, for which a chunk that is missing although its unit is finished is an error."""

    async def get(self, key: str, *rest: Any, **options: Any) -> Buffer | None:
        found = await super().get(key, *rest, **options)
        status = status_key_of(key) if found is None else None
        if status is not None and await self.exists(status):
            raise ValueError(missing(key))
        return found


def open_url(url: str, mode: str) -> Store:
    try:
        obstore = importlib.import_module("obstore.store")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"store {url}: object stores need obstore, which is not installed; pip install 'icons-lightning[s3]'"
        ) from error
    return CheckedObjectStore(obstore.from_url(url), read_only=mode == "r")
