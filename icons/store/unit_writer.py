"""UnitWriter: collects rows into units and stores finished units from background threads.

Some write the rows of units and give back their memory at once. One waits for the disk: it makes durable whatever has
been written meanwhile, however many units that are, and then writes their status. So no row is computed later, and
none is held in memory for longer, because a disk takes its time to be sure.
"""

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import TypeVar

import numpy as np

from icons.store import GradientStore, ScoreStore
from icons.store.file import LostUnit
from icons.store.lease import Leases
from icons.store.open_unit import Columns, OpenUnit
from icons.store.row_store import RowStore
from icons.terminal import counted

_Item = TypeVar("_Item")
WRITERS = 2  # so that one copies while the other makes checksums, or waits for an object store
UNCOMMITTED = 8  # written units that may wait until they are made durable


class UnitWriter:
    """Stores units while the next ones are computed.

    Memory: `queue_units` finished units that wait, `WRITERS` that are being written, and those being collected (one,
    where batches come unit after unit), whatever the number of rows.

    Args:
        store: opened for writing.
        again: units to be written although they are finished (failed rows to be retried), with their statuses as they
            were when that was planned (`statuses_of`): one that has others by now, another run has written
            again meanwhile. A unit is marked as not written when it is claimed, and by nobody afterwards.
        queue_units: finished units that may wait; `collect` waits when there are more.
        lease_timeout_s: see `Leases`.
    """

    def __init__(
        self,
        store: GradientStore | ScoreStore,
        *,
        again: Mapping[int, np.ndarray] | None = None,
        queue_units: int = 2,
        lease_timeout_s: float = 90.0,
    ) -> None:
        self.store = store
        self.again = dict(again or {})
        self.leases = Leases(store.storage, lease_timeout_s)
        self.open_units: dict[int, OpenUnit] = {}
        self.elsewhere: dict[int, str] = {}  # units that another run holds, and who it is
        self.spare: list[Columns] = []
        self.error: BaseException | None = None
        self.waiting: queue.Queue[tuple[int, Columns] | None] = queue.Queue(queue_units)
        self.written: queue.Queue[tuple[int, np.ndarray] | None] = queue.Queue(UNCOMMITTED)
        self.writers = [
            threading.Thread(target=self.write_units, name="icons-writer", daemon=True) for _ in range(WRITERS)
        ]
        self.committer = threading.Thread(target=self.commit_units, name="icons-commit", daemon=True)
        for thread in (*self.writers, self.committer):
            thread.start()

    def claim(self, unit: int, patient: bool = False) -> bool:
        """Whether this run is to compute `unit`: it holds the lease, and nobody has finished the unit meanwhile.

        From then on the unit is not written, and whoever finds it finished has lost it.

        Args:
            unit: which.
            patient: watch an owner on another machine until it has moved, or is given up.
        """
        if unit in self.leases.held:
            return True
        try:
            acquired = self.leases.acquire_patiently(unit) if patient else self.leases.acquire(unit)
        except OSError as error:
            raise self.explained(error) from error
        if not acquired:
            self.elsewhere[unit] = str(self.leases.holder(unit) or "another run")
            return False
        self.elsewhere.pop(unit, None)
        self.store.check_same()
        rows = self.store.partition.unit_rows(unit)
        status, planned = self.store.stored("status", slice(rows.start, rows.stop)), self.again.get(unit)
        if status.all() and (planned is None or not np.array_equal(status, planned)):
            self.leases.release(unit, done=True)
            return False
        self.store.unwrite([unit])
        return True

    def sweep(self) -> None:
        """Removes what runs left behind that died while they wrote a unit, or before they gave back its lease."""
        missing = set(self.store.missing())
        self.store.storage.sweep(missing)
        self.leases.sweep(lambda unit: unit not in missing)

    def collect(self, row: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Takes rows in any order; a unit whose rows have all arrived is passed on to be stored.

        Args:
            row: `[B]` int64, row numbers.
            values: `gradient [B, K]`, `norm`, `loss`, `tokens`, `status`.

        Raises:
            OSError: an earlier unit could not be stored.
        """
        self.check()
        units = row // self.store.partition.chunk_rows
        if len(units) and (units == units[0]).all():  # as a run's batches are, which are formed inside units
            return self.collect_of_unit(int(units[0]), row, values)
        for unit in np.unique(units).tolist():
            here = units == unit
            self.collect_of_unit(unit, row[here], {name: values[name][here] for name in self.store.FIELDS})
        return None

    def collect_of_unit(self, unit: int, row: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        if not self.claim(unit):
            return
        rows = self.store.partition.unit_rows(unit)
        opened = self.open_units.get(unit)
        if opened is None:
            opened = self.open_units[unit] = OpenUnit(self.store.encode, len(rows), self.memory_for(len(rows)))
        if opened.add(row - rows.start, values):
            self.pass_on(unit, self.open_units.pop(unit).columns)

    def store_unit(self, unit: int, columns: Columns) -> None:
        """Passes a whole unit that was claimed on to be stored; waits while too many wait before it.

        Args:
            unit: claimed.
            columns: the store's arrays, for all rows of the unit in order.

        Raises:
            OSError: an earlier unit could not be stored.
        """
        self.store.check_values(unit, columns)
        self.pass_on(unit, columns)

    def memory_for(self, num_rows: int) -> Columns:
        """The arrays of a unit that has been stored, to be used again: fresh memory costs as much as filling it."""
        while self.spare:
            columns = self.spare.pop()
            if len(columns["status"]) == num_rows:
                return columns
        return {}

    def pass_on(self, unit: int, columns: Columns) -> None:
        while True:
            self.check()
            try:
                return self.waiting.put((unit, columns), timeout=0.2)
            except queue.Full:
                continue

    def write_units(self) -> None:
        """A background thread: writes the rows of what is passed on; after an error it only empties the queue."""
        for unit, columns in _drained(self.waiting):
            if self.error is None:
                try:
                    with suppress(LostUnit):
                        self.check_ours(unit)
                        self.store.write_rows(unit, columns, partial(self.check_ours, unit))
                        self.written.put((unit, columns["status"].copy()))
                    if len(self.spare) < self.waiting.maxsize + WRITERS:
                        self.spare.append(columns)
                except BaseException as error:
                    self.error = self.error or error

    def commit_units(self) -> None:
        """A background thread: makes durable what is written, as much at once as there is, and says that it is done.

        What was written before a unit that could not be is kept. After an error of its own it only empties the queue: a
        disk that has lost something may call the same files safe when it is asked again.
        """
        failed = False
        for group in _drained_together(self.written):
            if not failed:
                try:
                    self.commit(dict(group))
                except BaseException as error:
                    self.error, failed = self.error or error, True

    def commit(self, statuses: dict[int, np.ndarray]) -> None:
        guards = {unit: partial(self.check_ours, unit) for unit in statuses}
        for unit in self.store.commit(statuses, guards):
            self.leases.release(unit, done=True)

    def check_ours(self, unit: int) -> None:
        """Called before each file of a unit is seen.

        Raises:
            FileNotFoundError, ValueError: the store has vanished, or another one is in its place.
            LostUnit: another run has taken the unit over, or finished it.
        """
        self.store.check_same()
        if self.leases.owns(unit) and not self.store.is_written(unit):
            return
        self.elsewhere[unit] = str(self.leases.holder(unit) or "another run")
        raise LostUnit(f"unit {unit}")

    def check(self) -> None:
        """Raises the background threads' error, with what it means."""
        if self.error is not None:
            raise self.explained(self.error) from self.error

    def explained(self, error: BaseException) -> BaseException:
        if not isinstance(error, OSError) or error.errno is None:
            return error
        message = (
            f"store {self.store.path}: could not be written ({error.strerror}); finished units are kept: mend the "
            "cause, and run the same line again to resume"
        )
        return OSError(error.errno, message)

    def close(self) -> None:
        """Waits until everything that was passed on is stored; gives back the leases of units that are not finished."""
        if self.committer.is_alive():
            self.waiting.put(None)
            for thread in self.writers:
                thread.join()
            self.written.put(None)
            self.committer.join()
        try:
            self.store.storage.flush()
        finally:
            self.leases.close()

    def finish(self) -> None:
        """`close`, and then raises if not everything was stored.

        Raises:
            OSError: a unit could not be stored.
            ValueError: a unit is incomplete, or another run holds it.
        """
        self.close()
        self.check()
        if self.open_units:
            unit, opened = next(iter(self.open_units.items()))
            row = self.store.partition.unit_rows(unit).start + int(np.flatnonzero(~opened.arrived)[0])
            raise ValueError(
                f"store {self.store.path}: {counted(len(self.open_units), 'incomplete unit')}, for example unit "
                f"{unit}: row {row} never came; expected every row of a unit from the one rank that computes it"
            )
        if unfinished := {unit: who for unit, who in self.elsewhere.items() if not self.store.is_written(unit)}:
            unit, who = next(iter(unfinished.items()))
            raise ValueError(
                f"store {self.store.path}: another run is computing {counted(len(unfinished), 'unit')}, for example "
                f"unit {unit} by {who}; this run stored all others: run the same line again when that run has ended"
            )


def statuses_of(store: RowStore, units: Iterable[int], statuses: np.ndarray) -> dict[int, np.ndarray]:
    """Some units' part of all statuses."""
    rows = {unit: store.partition.unit_rows(unit) for unit in units}
    return {unit: statuses[of_unit.start : of_unit.stop] for unit, of_unit in rows.items()}


def _drained(items: "queue.Queue[_Item | None]") -> Iterator[_Item]:
    """What a queue brings, until it brings None, which stays there for other threads."""
    while (item := items.get()) is not None:
        yield item
    items.put(None)


def _drained_together(items: "queue.Queue[_Item | None]") -> Iterator[list[_Item]]:
    """What a queue brings, as much at once as is ready and the queue can hold, until it brings None."""
    for item in _drained(items):
        group: list[_Item] = [item]
        with suppress(queue.Empty):
            while len(group) < items.maxsize:
                more = items.get_nowait()
                if more is None:
                    items.put(None)  # seen too early: it is to end the outer loop
                    break
                group.append(more)
        yield group
