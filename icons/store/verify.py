"""Looks at every chunk of a store: is it there, whole, and does what it holds agree with its status and manifest?"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from icons.batch import Status
from icons.store.chunk import chunk_key
from icons.store.folder import PARTIAL
from icons.store.gradient_store import GradientStore
from icons.store.row_store import RowStore


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        array: where; empty: the store as a whole.
        unit: which unit; None: no single one.
        what: what is wrong, with rows.
    """

    array: str
    unit: int | None
    what: str

    def __str__(self) -> str:
        place = "store" if not self.array else self.array if self.unit is None else f"{self.array}, unit {self.unit}"
        return f"{place}: {self.what}"


def verify(store: RowStore, on_unit: Callable[[], None] | None = None) -> Iterator[Finding]:
    """Findings of the whole store, unit by unit; memory for one unit.

    Args:
        store: opened.
        on_unit: called after each unit.
    """
    yield from verify_shapes(store)
    for unit in range(store.partition.num_units):
        yield from verify_unit(store, unit)
        if on_unit is not None:
            on_unit()


def repair(store: RowStore, findings: Iterable[Finding]) -> list[int]:
    """Marks the units of the findings as not written, so that the next run computes them, and removes the unfinished
    files of killed runs; the units, ascending."""
    units = sorted({finding.unit for finding in findings if finding.unit is not None})
    store.unwrite(units)
    for key in store.storage.list(""):
        if key.endswith(PARTIAL):
            store.storage.delete(key)
    return units


def verify_shapes(store: RowStore) -> Iterator[Finding]:
    """Arrays against one another and against the manifest."""
    for name, array in store.arrays.items():
        if (array.shape[0], array.chunks[0]) != (store.num_rows, store.partition.chunk_rows):
            yield Finding(name, None, f"has {array.shape[0]} rows in chunks of {array.chunks[0]}; status has others")
    if not isinstance(store, GradientStore):
        return
    manifest = store.manifest
    stated = {
        "dtype": (manifest.get("dtype"), store.dtype),
        "projector.dim": (manifest.get("projector", {}).get("dim"), store.dim),
        "data.num_rows": (manifest.get("data", {}).get("num_rows"), store.num_rows),
    }
    for name, (said, found) in stated.items():
        if said is not None and said != found:
            yield Finding("", None, f"the manifest says {name} = {said!r}, the arrays have {found!r}")


def verify_unit(store: RowStore, unit: int) -> list[Finding]:
    """Findings of one unit; none for a unit that is not written."""
    if not store.storage.exists(chunk_key("status", unit, 1)):
        return []
    rows = store.partition.unit_rows(unit)
    values: dict[str, np.ndarray] = {}
    findings: list[Finding] = []
    for name, array in store.arrays.items():
        key = chunk_key(name, unit, array.ndim)
        if not store.storage.exists(key):
            findings.append(Finding(name, unit, f"the chunk {key} is missing"))
            continue
        try:
            values[name] = np.asarray(array[rows.start : rows.stop])
        except Exception as error:  # zarr has no one class for what it cannot decode
            findings.append(Finding(name, unit, f"the chunk {key} is damaged ({str(error).partition('.')[0]})"))
    if findings:
        return findings
    checks = gradient_checks if isinstance(store, GradientStore) else score_checks
    return [
        Finding(name, unit, f"{what}: {describe_rows(np.flatnonzero(wrong) + rows.start)}")
        for name, what, wrong in [*status_checks(values), *checks(values)]
        if wrong.any()
    ]


Check = tuple[str, str, np.ndarray]  # array, what is wrong, which rows


def status_checks(values: dict[str, np.ndarray]) -> list[Check]:
    status = values["status"]
    return [
        ("status", "not written, in a unit that is", status == Status.NOT_WRITTEN),
        ("status", "a code that has no meaning", ~np.isin(status, [int(known) for known in Status])),
    ]


def gradient_checks(values: dict[str, np.ndarray]) -> list[Check]:
    done, failed = values["status"] == Status.DONE, values["status"] > Status.DONE
    gradient = values["gradients"]
    finite, zero = np.isfinite(gradient).all(axis=1), ~gradient.any(axis=1)
    checks = [
        ("gradients", "status says done, and numbers are not finite", done & ~finite),
        ("gradients", "status says done, and all numbers are 0", done & zero),
        ("gradients", "status says failed, and the row is not 0", failed & ~zero),
    ]
    for name in ("norm", "loss", *(["scale"] if "scale" in values else [])):
        checks.append((name, "status says done, and the number is not finite", done & ~np.isfinite(values[name])))
    for name in ("norm", "loss"):
        checks.append((name, "status says failed, and there is a number", failed & ~np.isnan(values[name])))
    checks.append(("norm", "status says done, and the number is not above 0", done & (values["norm"] <= 0)))
    checks.append(("tokens", "status says done, and there is no token", done & (values["tokens"] < 1)))
    return checks


def score_checks(values: dict[str, np.ndarray]) -> list[Check]:
    done = values["status"] == Status.DONE
    finite = np.isfinite(values["influence"]).all(axis=1)
    return [("influence", "status says done, and a number is not finite", done & ~finite)]


def describe_rows(rows: np.ndarray) -> str:
    """Some row numbers, for a message.

    >>> describe_rows(np.arange(10))
    'rows 0, 1, 2, 3, 4 and 5 more'
    """
    first = ", ".join(str(row) for row in rows[:5].tolist())
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {first}{more}"
