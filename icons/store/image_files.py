"""Whether a store may be gone on with as far as image files tell, and what it knows of them afterwards."""

from collections.abc import Mapping
from typing import Any

from icons.agreement import IMAGE_FILES, check_image_files
from icons.batch import Status
from icons.store.row_store import RowStore


def check_images(store: RowStore, manifest: Mapping[str, Any]) -> None:
    """Refuses to go on with a store if an image file has been replaced since it was begun.

    Args:
        store: what is gone on with.
        manifest: this run's.

    Raises:
        ValueError: the image, its row, and what to do.
    """
    check_images_of_rows(store, manifest)
    for task, entry in (manifest.get("tasks") or {}).items():
        begun = (store.manifest.get("tasks") or {}).get(task) or {}
        if isinstance(begun, Mapping):  # scores of gradient stores are compared by these
            check_image_files(begun, entry, f"task {task} of the store {store.path}")


def check_images_of_rows(store: RowStore, manifest: Mapping[str, Any], **options: str) -> None:
    """`check_images` of the rows' own images, not of the tasks'; `options` as for `check_image_files`.

    Images of failed rows may have been mended. Stores of former versions know of no image.
    """
    check_image_files(store.manifest, manifest, f"the store {store.path}", _failed(store), **options)


def renew_images(store: RowStore, manifest: Mapping[str, Any]) -> None:
    """Notes the files that have been added or mended since the store was begun, which `check_images` has let pass."""
    begun, marks = store.facts.image_files, manifest.get(IMAGE_FILES) or {}
    known = {
        row: {name: marks.get(row, {}).get(name) or mark for name, mark in files.items()}
        for row, files in begun.items()
    }
    if known != begun:
        store.amend(**{IMAGE_FILES: known})


def _failed(store: RowStore) -> list[str]:
    """Those of the rows with marks that have failed."""
    rows = [int(row) for row in store.facts.image_files if row.isdecimal() and int(row) < store.num_rows]
    statuses = store.statuses() if rows else ()
    return [str(row) for row in rows if statuses[row] > Status.DONE]
