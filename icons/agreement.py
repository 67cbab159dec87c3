"""Agreement: what must be the same in two manifests, by what is made from both.

A field is named with dots: `projector` compares all of it, `data.fingerprint` one entry.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

# training rows and a task's rows, multiplied with each other
MULTIPLIED = (
    "collect", "projector", "model.fingerprint", "adapter.fingerprint", "target", "preprocessing.template",
    "preprocessing.preset", "preprocessing.processor", "reader",
)  # fmt: skip
# a gradient store and the run that goes on with it
RESUMED = (
    "collect", "data", "model", "adapter", "projector", "preconditioner", "target", "preprocessing",
    "reader", "dtype",
)  # fmt: skip
# Kronecker factors and the run that makes them
FACTORS = ("data", "model", "adapter", "target", "preprocessing", "reader", "factors")
# a gradient store and the scores that were made from it
SOURCE = ("data.fingerprint", "model.fingerprint", "adapter.fingerprint", "projector", "preconditioner")
# a score store and the run of `icons influence` that goes on with it
SCORES = (
    "data", "train", "tasks", "normalize", "task_normalize", "weights", "groups", "reduce", "pairwise", "top_pairs",
    "drop_axes", "subspace",
)  # fmt: skip
# two vectors of one task
TASK_VECTOR = ("data", "model", "adapter", "preprocessing", "reader", "normalize", "directions")
# exact scores of which some columns are taken over
REUSED_SCORES = (
    "data", "model", "adapter", "preprocessing", "reader", "normalize", "preconditioner", "target", "drop_axes",
    "subspace",
)  # fmt: skip
# exact scores and the run of `icons score` that goes on with them
EXACT_SCORES = (*REUSED_SCORES, "tasks", "groups", "reduce")
# a weighted sum of exact scores and the run that makes it
SUMMED_SCORES = ("data", "tasks", "weights", "checkpoints", "drop_axes", "subspace")

PLACES = {"path", "images", "name"}
"""Where a file lies may change between a run and its resume; what is in it may not."""
_HINTS = {"model.fingerprint": " (frozen weights that are others, or the same in another number format: --model-dtype)"}
"""Said where a value shows nothing by itself."""
STATUSES = "status_digest"
"""The entry of a source in a score store's manifest that says which statuses its rows had."""
_PUT_BACK = "what was measured is of the former data: put it back, or "
IMAGE_FILES = "image_files"
"""Row -> image -> the mark of its file (`icons.datamodules.image_marks`), compared by `check_image_files` alone."""
_LATER = {"preprocessing.template", "preprocessing.preset", "reader"}
"""Fields that stores of former versions lack: nothing is known of them, and they agree with all."""


def check_compatible(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    fields: Iterable[str],
    what_a: str = "the store",
    what_b: str = "this run",
    remedy: str = "expected both to be the same: mend one, or use another store",
) -> None:
    """Compares two manifests in the given fields.

    Raises:
        ValueError: the first difference, with its field and both values.

    >>> check_compatible({"dtype": "int8"}, {"dtype": "int8"}, ["dtype"])
    """
    for name, left, right in differences(a, b, fields):
        raise ValueError(f"{name}: {what_a} has {left!r}, {what_b} has {right!r}{_HINTS.get(name, '')}; {remedy}")


def differences(a: Mapping[str, Any], b: Mapping[str, Any], fields: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    """The entries in which two manifests differ, as JSON has them: what is compared later is what was saved.

    >>> list(differences({"a": {"b": (1, 2), "c": 3}}, {"a": {"b": [1, 2], "c": 4}}, ["a"]))
    [('a.c', 3, 4)]
    """
    one, other = plain(a), plain(b)
    for field in fields:
        left, right = lookup(one, field), lookup(other, field)
        if not (field in _LATER and None in (left, right)):
            yield from leaves(field, left, right)


def leaves(name: str, left: Any, right: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in [key for key in {**left, **right} if key != IMAGE_FILES]:
            yield from leaves(f"{name}.{key}", left.get(key), right.get(key))
    elif left != right:
        yield name, left, right


def check_image_files(
    begun: Mapping[str, Any],
    now: Mapping[str, Any],
    what: str,
    failed: Collection[str] = (),
    remedy: str = "give another place or --overwrite",
) -> None:
    """Compares the marks of image files in two manifests. A file that one of them lacks has only been added or taken
    away, which its row's status says.

    Args:
        begun: the manifest of what is gone on with.
        now: this run's.
        what: it is.
        failed: rows that have failed in it: their images may have been mended.
        remedy: what to do, other than putting the former images back.

    Raises:
        ValueError: a file has other bytes than it had: the image, its row, and what to do.
    """
    marks = now.get(IMAGE_FILES) or {}
    for row, files in (begun.get(IMAGE_FILES) or {}).items():
        for name, mark in files.items():
            mark_now = marks.get(row, {}).get(name)
            if mark and mark_now and mark != mark_now and row not in failed:
                raise ValueError(
                    f"image {name} of row {row}: has other bytes than when {what} was begun ({_size(mark)} then, "
                    f"{_size(mark_now)} now); what is there is of the former images: put them back, or {remedy}"
                )


def check_tasks(begun: Mapping[str, Any], now: Mapping[str, Any], what: str, remedy: str) -> None:
    """Compares the tasks' files, and their images, of two manifests' `tasks`. Of a task that one of them lacks nothing
    is known.

    Raises:
        ValueError: a file holds other data, or an image other bytes.
    """
    for task in [task for task in now if task in begun]:
        check_compatible(
            begun[task], now[task], ["data.fingerprint"], f"task {task} of {what}", "its file", f"{_PUT_BACK}{remedy}"
        )
        check_image_files(begun[task], now[task], f"task {task} of {what}", remedy=remedy)


def _size(mark: str) -> str:
    size = mark.partition("-")[0]
    return f"{int(size):,} bytes" if size.isdecimal() else "?"


def lookup(manifest: Any, field: str) -> Any:
    """An entry by its dotted name; None if it is not there."""
    for part in field.split("."):
        manifest = manifest.get(part) if isinstance(manifest, Mapping) else None
    return manifest


def plain(value: Any) -> Any:
    """A manifest as JSON has it."""
    return json.loads(json.dumps(value, default=str))
