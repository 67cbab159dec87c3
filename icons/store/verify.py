"""Looks at every chunk of a store: is it there, whole, and does what it holds agree with its status and manifest?"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from icons.batch import Status
from icons.store import unit_digest
from icons.store.chunk import chunk_key
from icons.store.file import PARTIAL
from icons.store.gradient_store import GradientStore
from icons.store.layout import changed_arrays
from icons.store.row_store import RowStore
from icons.store.storage import Storage

log = logging.getLogger(__name__)

_GROUP_BYTES = 1 << 24


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
        where = "store" if not self.array else self.array if self.unit is None else f"{self.array}, unit {self.unit}"
        return f"{where}: {self.what}"


def verify_layout(storage: Storage) -> list[Finding]:
    """Arrays whose metadata are not as the store was made: to be asked before it is opened, since no row can be read
    by them. Nothing is known of a store of format 1."""
    return [Finding(name, None, f"{name}/zarr.json {what}") for name, what in changed_arrays(storage).items()]


def verify(store: RowStore, on_unit: Callable[[], None] | None = None) -> Iterator[Finding]:
    """Findings of the whole store, unit by unit; memory for a few chunks. Where arrays disagree about their shapes,
    that alone: nothing can be said about their rows.

    Args:
        store: opened.
        on_unit: called after each unit.
    """
    shapes = list(_verify_shapes(store))
    yield from shapes
    if shapes:
        return
    status = set(store.storage.list("status/c/"))
    for units in _groups(store):
        written = [unit for unit in units if chunk_key("status", unit, 1) in status]
        findings = _verify_units(store, written)
        read = (store.storage.path, units.start, units.stop - 1, len(written), len(findings))
        log.debug("%s: units %d to %d: %d written, read again; %d findings", *read)
        yield from findings
        if on_unit is not None:
            for _ in units:
                on_unit()


def _groups(store: RowStore) -> Iterator[range]:
    """Units that are read together, so that small ones cost no more than their files."""
    row_bytes = store.num_bytes() / store.num_rows
    size = max(1, int(_GROUP_BYTES / (row_bytes * store.partition.chunk_rows)))
    for start in range(0, store.partition.num_units, size):
        yield range(start, min(start + size, store.partition.num_units))


def repair(store: RowStore, findings: Iterable[Finding]) -> list[int]:
    """Marks the units of the findings as not written, so that the next run computes them, and removes the unfinished
    files of killed runs; the units, ascending."""
    units = sorted({finding.unit for finding in findings if finding.unit is not None})
    store.unwrite(units)
    for key in store.storage.list(""):
        if key.endswith(PARTIAL):
            store.storage.delete(key)
    return units


def _verify_shapes(store: RowStore) -> Iterator[Finding]:
    """Arrays against one another and against the manifest."""
    for name, array in store.arrays.items():
        if (array.shape[0], array.chunks[0]) != (store.num_rows, store.partition.chunk_rows):
            yield Finding(name, None, f"has {array.shape[0]} rows in chunks of {array.chunks[0]}; status has others")
    if not isinstance(store, GradientStore):
        return
    facts = store.facts
    stated = {
        "dtype": (facts.dtype, store.dtype),
        "projector.dim": (facts.projector.dim, store.dim),
        "data.num_rows": (facts.data.num_rows, store.num_rows),
    }
    for name, (said, actual) in stated.items():
        if said is not None and said != actual:
            yield Finding("", None, f"the manifest says {name} = {said!r}, the arrays have {actual!r}")


def _verify_units(store: RowStore, units: Sequence[int]) -> list[Finding]:
    """Findings of finished units, ascending."""
    findings: list[Finding] = []
    whole: list[tuple[int, dict[str, np.ndarray]]] = []
    for unit in units:
        values, of_unit = _read_unit(store, unit)
        findings += of_unit
        if len(values) == len(store.arrays):
            whole.append((unit, values))
    if whole:
        findings += _verify_values(store, whole)
    return sorted(findings, key=lambda finding: finding.unit or 0)


def _read_unit(store: RowStore, unit: int) -> tuple[dict[str, np.ndarray], list[Finding]]:
    """The rows of a finished unit by array, without those that cannot be read, and what is wrong with its files."""
    values: dict[str, np.ndarray] = {}
    findings: list[Finding] = []
    digest = unit_digest.from_bytes(store.storage.get(unit_digest.digest_key(unit))) if store.has_digests else None
    if store.has_digests and digest is None:
        findings.append(Finding("status", unit, f"the digest {unit_digest.digest_key(unit)} is missing or damaged"))
    num_rows = len(store.partition.unit_rows(unit))
    for name, array in store.arrays.items():
        key = chunk_key(name, unit, array.ndim)
        content = _read_chunk(store.storage, key)
        if content is None:
            findings.append(Finding(name, unit, f"the chunk {key} is missing"))
            continue
        try:
            values[name] = store.chunks.decoded(name, unit, content)[:num_rows]
        except Exception as error:  # zarr has no one class for what it cannot decode
            findings.append(Finding(name, unit, f"the chunk {key} is damaged ({str(error).partition('.')[0]})"))
            continue
        if digest is not None and digest.get(name) != unit_digest.stated(content):
            what = f"the chunk {key} is not the one that was written with its unit"
            findings.append(Finding(name, unit, f"{what} (checksum {unit_digest.stated(content)}, {digest.get(name)})"))
    return values, findings


def _read_chunk(storage: Storage, key: str) -> np.ndarray | None:
    if storage.folder is not None:
        return storage.folder.read_array(key)
    try:
        content = storage.get(key)
    except ValueError:  # missing, and its unit is finished
        return None
    return None if content is None else np.frombuffer(content, np.uint8)


def _verify_values(store: RowStore, units: Sequence[tuple[int, dict[str, np.ndarray]]]) -> list[Finding]:
    """What rows say, against their status: several units at once, since most of it costs as much for one as for all."""
    values = {name: np.concatenate([of_unit[name] for _, of_unit in units]) for name in store.arrays}
    rows = np.concatenate([np.asarray(store.partition.unit_rows(unit)) for unit, _ in units])
    checks = _gradient_checks if isinstance(store, GradientStore) else _score_checks
    findings = []
    for name, what, wrong in [*_status_checks(values), *checks(values)]:
        places = rows[wrong]
        for unit in np.unique(places // store.partition.chunk_rows).tolist():
            here = places[places // store.partition.chunk_rows == unit]
            findings.append(Finding(name, unit, f"{what}: {_describe_rows(here)}"))
    return findings


_Check = tuple[str, str, np.ndarray]  # array, what is wrong, which rows


def _status_checks(values: dict[str, np.ndarray]) -> list[_Check]:
    status = values["status"]
    return [
        ("status", "not written, in a unit that is", status == Status.NOT_WRITTEN),
        ("status", "a code that has no meaning", ~np.isin(status, [int(known) for known in Status])),
    ]


def _gradient_checks(values: dict[str, np.ndarray]) -> list[_Check]:
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


def _score_checks(values: dict[str, np.ndarray]) -> list[_Check]:
    done = values["status"] == Status.DONE
    finite = np.isfinite(values["influence"]).all(axis=1)
    return [("influence", "status says done, and a number is not finite", done & ~finite)]


def _describe_rows(rows: np.ndarray) -> str:
    """Some row numbers, for a message.

    >>> _describe_rows(np.arange(10))
    'rows 0, 1, 2, 3, 4 and 5 more'
    """
    first = ", ".join(str(row) for row in rows[:5].tolist())
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {first}{more}"
