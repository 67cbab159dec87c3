"""Why rows failed: beside a store's status, one small file for each unit with failed rows, a line for each of them.

`status/failures/UNIT.jsonl` holds `{"row", "id", "status", "reason"}` a line. It is written before the unit's status,
so that a row that is said to have failed has its sentence. At most 1,000 rows of a unit and 300 characters of a
sentence are kept; the status of every row is kept in any case.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from icons.batch import Status
from icons.store.gradient_store import GradientStore
from icons.store.row_store import RowStore
from icons.terminal import counted

_FOLDER = "status/failures/"
MOST_ROWS, LONGEST = 1000, 300
_EXAMPLES = 3
_PLAIN = {  # what is said of a row without a sentence of its own
    Status.BAD_RECORD: "the record is no conversation",
    Status.IMAGE_MISSING: "its image is missing",
    Status.IMAGE_BROKEN: "its image cannot be decoded",
    Status.NO_SUPERVISED_TOKEN: "no token of an answer is left to train on",
    Status.NON_FINITE: "the loss or the gradient is not finite, or too large for the store's dtype",
    Status.TOO_LARGE: "it is larger than the settings allow",
}
_OWN = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[\d/\\]\S*")  # what tells one row's sentence from another's of its kind


class Failure(NamedTuple):
    """A failed row."""

    row: int
    id: str
    status: Status
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}{f' (id {self.id})' if self.id else ''}: {self.reason}"


@dataclass
class FailureKind:
    """Failed rows with one reason: how many there are, and the first of them."""

    status: Status
    count: int = 0
    examples: list[Failure] = field(default_factory=list)


class FailureLog:
    """Collects the failures of the rows that arrive, and writes those of a unit when all of its rows have.

    Args:
        store: opened for writing.
        again: units that are written anew, whose former failures are forgotten.
    """

    def __init__(self, store: RowStore, again: Iterable[int] = ()) -> None:
        self.store, self.again = store, frozenset(again)
        self.arrived: defaultdict[int, int] = defaultdict(int)
        self.failures: defaultdict[int, list[Failure]] = defaultdict(list)

    def add(self, rows: np.ndarray, failures: Sequence[Failure]) -> None:
        """Takes rows and those of them that failed; call it before the rows themselves are passed on to be stored."""
        partition = self.store.partition
        for failure in failures:
            kept = self.failures[partition.unit_of(failure.row)]
            if len(kept) < MOST_ROWS:
                kept.append(failure)
        units, counts = np.unique(rows // partition.chunk_rows, return_counts=True)
        for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
            self.arrived[unit] += count
            if self.arrived[unit] == len(partition.unit_rows(unit)):
                del self.arrived[unit]
                self.write(unit, self.failures.pop(unit, []))

    def write(self, unit: int, failures: Sequence[Failure]) -> None:
        key = f"{_FOLDER}{unit}.jsonl"
        if failures:
            lines = [
                json.dumps({"row": one.row, "id": one.id, "status": one.status.name.lower(), "reason": one.reason})
                for one in sorted(shortened(failure) for failure in failures)
            ]
            self.store.storage.put(key, ("\n".join(lines) + "\n").encode())
        elif unit in self.again and self.store.storage.exists(key):
            self.store.storage.delete(key)


def shortened(failure: Failure) -> Failure:
    reason = failure.reason if len(failure.reason) <= LONGEST else failure.reason[:LONGEST] + " …"
    return failure._replace(reason=reason, id=failure.id[:LONGEST])


def failures_in(batch: Mapping[str, Any]) -> list[Failure]:
    """The failed rows of a batch (`icons.batch`) that bring their sentences along; others have their status alone."""
    if "failed_reason" not in batch:
        return []
    statuses = [Status(code) for code in batch["failed_status"].tolist()]
    parts = (batch["failed_row"].tolist(), batch["failed_id"], statuses, batch["failed_reason"])
    return [Failure(*one) for one in zip(*parts, strict=True)]


def failures_of(store: RowStore, rows: Sequence[int] | np.ndarray | None = None) -> Iterator[Failure]:
    """The failed rows of a store, ascending, each with its sentence. Reads the units with failed rows alone.

    A score store made of gradient stores has the sentences of the first of these, where that still lies at its place.

    Args:
        store: gradient or score store.
        rows: only these; None: all.
    """
    statuses = store.statuses()
    failed = np.flatnonzero(statuses > Status.DONE)
    failed = failed if rows is None else np.intersect1d(failed, np.asarray(rows))
    source, known, unit = _source_of(store), dict[int, Failure](), -1
    for row in failed.tolist():
        if store.partition.unit_of(row) != unit:
            unit = store.partition.unit_of(row)
            known = _read(source, store.partition.unit_rows(unit))
        status = Status(int(statuses[row]))
        own = known.get(row)
        yield own if own is not None and own.status == status else Failure(row, "", status, _PLAIN.get(status, ""))


def _source_of(store: RowStore) -> RowStore:
    """The store that holds the sentences: the one itself, or the first that its scores were made from."""
    if store.KIND != "score" or store.storage.list(_FOLDER):
        return store
    for made_from in (store.manifest.get("train") or [])[:1]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            source = GradientStore.open(made_from["path"])
            if source.num_rows == store.num_rows:
                return source
    return store


def _read(source: RowStore, rows: range) -> dict[int, Failure]:
    """The sentences of the rows, by row; what cannot be read is left out."""
    failures = {}
    for unit in range(source.partition.unit_of(rows.start), source.partition.unit_of(rows.stop - 1) + 1):
        for line in (source.storage.get(f"{_FOLDER}{unit}.jsonl") or b"").splitlines():
            with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                one = json.loads(line)
                failure = Failure(int(one["row"]), str(one["id"]), Status[one["status"].upper()], str(one["reason"]))
                failures[failure.row] = failure
    return failures


def check_some_done(store: RowStore, rows: np.ndarray | None = None) -> None:
    """Refuses a store of which every row failed: nothing can be made of it.

    Args:
        store: gradient or score store.
        rows: look at these alone; None: all.

    Raises:
        ValueError: all of the rows failed; says why the first did.
    """
    statuses = store.statuses() if rows is None else store.statuses()[rows]
    if len(statuses) and (statuses > Status.DONE).all():
        first = next(failures_of(store, rows))
        raise ValueError(
            f"store {store.path}: each of its rows failed ({len(statuses):,}); the first, {first}; expected one at "
            "least that can be used: mend the cause, and give another --out, or the same line with --retry-failed"
        )


def kinds(failures: Iterable[Failure]) -> list[FailureKind]:
    """Failures summed up by kind, the most frequent first, with up to three examples each.

    Sentences are of one kind if they differ in names, numbers and quoted parts alone.

    >>> one = Failure(3, "a", Status.IMAGE_MISSING, "image a/1.jpg is not in images")
    >>> two = one._replace(row=4, reason="image b/2.jpg is not in images")
    >>> [(kind.count, len(kind.examples)) for kind in kinds([one, two])]
    [(2, 2)]
    """
    by_sentence: dict[tuple[Status, str], FailureKind] = {}
    for failure in failures:
        kind = by_sentence.setdefault((failure.status, _OWN.sub("…", failure.reason)), FailureKind(failure.status))
        kind.count += 1
        if len(kind.examples) < _EXAMPLES:
            kind.examples.append(failure)
    return sorted(by_sentence.values(), key=lambda kind: -kind.count)


def told(failures: Iterable[Failure]) -> Iterator[str]:
    """Failures by kind as lines of text: how many, and up to three of them."""
    for kind in kinds(failures):
        yield f"failed {counted(kind.count, 'row')}: {kind.status.name.lower()}"
        yield from (f"  {failure}" for failure in kind.examples)
