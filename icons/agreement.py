"""Agreement: what must be the same in two manifests, by what is made from both.

A field is named with dots: `projector` compares all of it, `data.fingerprint` one entry.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
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
HINTS = {"model.fingerprint": " (frozen weights that are others, or the same in another number format: --model-dtype)"}
"""Said where a value shows nothing by itself."""
LATER = {"preprocessing.template", "preprocessing.preset", "reader"}
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
        raise ValueError(f"{name}: {what_a} has {left!r}, {what_b} has {right!r}{HINTS.get(name, '')}; {remedy}")


def differences(a: Mapping[str, Any], b: Mapping[str, Any], fields: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    """The entries in which two manifests differ, as JSON has them: what is compared later is what was saved.

    >>> list(differences({"a": {"b": (1, 2), "c": 3}}, {"a": {"b": [1, 2], "c": 4}}, ["a"]))
    [('a.c', 3, 4)]
    """
    one, other = plain(a), plain(b)
    for field in fields:
        left, right = lookup(one, field), lookup(other, field)
        if not (field in LATER and None in (left, right)):
            yield from leaves(field, left, right)


def leaves(name: str, left: Any, right: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in [*left, *(key for key in right if key not in left)]:
            yield from leaves(f"{name}.{key}", left.get(key), right.get(key))
    elif left != right:
        yield name, left, right


def lookup(manifest: Any, field: str) -> Any:
    """An entry by its dotted name; None if it is not there."""
    for part in field.split("."):
        manifest = manifest.get(part) if isinstance(manifest, Mapping) else None
    return manifest


def plain(value: Any) -> Any:
    """A manifest as JSON has it."""
    return json.loads(json.dumps(value, default=str))
