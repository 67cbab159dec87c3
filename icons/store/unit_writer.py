"""UnitWriter: collects rows into units and stores finished units from a background thread."""

import queue
import threading
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from icons.store import GradientStore, ScoreStore
from icons.store.lease import Leases

Columns = dict[str, np.ndarray]
WRITERS = 2  # so that one encodes and writes while the other waits for the disk
GROUP_UNITS = 2  # units that are made durable together; with more, memory costs more than waiting for the disk


class OpenUnit:
    """A unit of which some rows have arrived, encoded as they will be stored."""

    def __init__(self, num_rows: int, columns: Columns) -> None:
        self.columns = columns
        self.arrived = np.zeros(num_rows, dtype=bool)

    def add(self, position: np.ndarray, rows: Columns) -> bool:
        """Puts rows at their positions; whether the unit is whole now."""
        for name, values in rows.items():
            if name not in self.columns:
                self.columns[name] = np.empty((len(self.arrived), *values.shape[1:]), values.dtype)
            self.columns[name][position] = values
        self.arrived[position] = True
        return bool(self.arrived.all())


class UnitWriter:
    """Stores units while the next ones are computed.

    Memory: `queue_units` finished units that wait, at most `WRITERS * GROUP_UNITS` that are being written, and those
    being collected (one, where batches come unit after unit), whatever the number of rows.

    Args:
        store: opened for writing.
        again: units to be written although they are not missing (failed rows to be retried).
        queue_units: finished units that may wait; `collect` waits when there are more.
        lease_timeout_s: see `Leases`.
        on_unit: called with the number of rows after each unit is stored, from the background thread.
    """

    def __init__(
        self,
        store: GradientStore | ScoreStore,
        *,
        again: Iterable[int] = (),
        queue_units: int = 2,
        lease_timeout_s: float = 90.0,
        on_unit: Callable[[int], None] | None = None,
    ) -> None:
        self.store, self.again, self.on_unit = store, frozenset(again), on_unit
        self.leases = Leases(store.storage, lease_timeout_s)
        self.open_units: dict[int, OpenUnit] = {}
        self.elsewhere: dict[int, str] = {}  # units that another run holds, and who it is
        self.spare: list[Columns] = []
        self.error: BaseException | None = None
        self.waiting: queue.Queue[tuple[int, Columns] | None] = queue.Queue(queue_units)
        self.threads = [threading.Thread(target=self.work, name="icons-writer", daemon=True) for _ in range(WRITERS)]
        for thread in self.threads:
            thread.start()

    def claim(self, unit: int, patient: bool = False) -> bool:
        """Whether this run is to compute `unit`: it holds the lease, and nobody has finished the unit meanwhile.

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
        if unit not in self.again and self.store.is_written(unit):
            self.leases.release(unit, done=True)
            return False
        return True

    def sweep(self) -> None:
        """Removes what runs left behind that died between storing a unit and giving back its lease."""
        missing = set(self.store.missing())
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
        for unit in np.unique(units).tolist():
            if not self.claim(unit):
                continue
            rows = self.store.partition.unit_rows(unit)
            opened, here = self.open_units.get(unit), units == unit
            if opened is None:
                opened = self.open_units[unit] = OpenUnit(len(rows), self.memory_for(len(rows)))
            mine = values if here.all() else {name: values[name][here] for name in self.store.FIELDS}
            if opened.add(row[here] - rows.start, self.store.encode(mine)):
                self.pass_on(unit, self.open_units.pop(unit).columns)

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

    def work(self) -> None:
        """A background thread: stores what is passed on; after an error it only empties the queue."""
        while group := self.next_group():
            if self.error is None:
                try:
                    self.store_units(group)
                except BaseException as error:
                    self.error = error

    def next_group(self) -> dict[int, Columns]:
        """Waits for a unit and takes what else is ready; empty: the end."""
        group: dict[int, Columns] = {}
        while len(group) < GROUP_UNITS:
            try:
                item = self.waiting.get(block=not group)
            except queue.Empty:
                break
            if item is None:
                self.waiting.put(None)  # for the other thread, or for ourselves, once this group is stored
                break
            group[item[0]] = item[1]
        return group

    def store_units(self, group: dict[int, Columns]) -> None:
        for unit in [unit for unit in group if not self.leases.owns(unit)]:
            self.elsewhere[unit] = str(self.leases.holder(unit) or "another run")
            del group[unit]
        self.store.write_columns(group)
        for unit, columns in group.items():
            self.leases.release(unit, done=True)
            if self.on_unit is not None:
                self.on_unit(len(columns["status"]))
        self.spare.extend(group.values())

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
        if any(thread.is_alive() for thread in self.threads):
            self.waiting.put(None)
            for thread in self.threads:
                thread.join()
        self.store.storage.flush()
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
                f"store {self.store.path}: {len(self.open_units)} units are incomplete, for example unit {unit}: row "
                f"{row} never came; expected every row of a unit from the one rank that computes it"
            )
        if unfinished := {unit: who for unit, who in self.elsewhere.items() if not self.store.is_written(unit)}:
            unit, who = next(iter(unfinished.items()))
            raise ValueError(
                f"store {self.store.path}: {len(unfinished)} units are being computed by another run, for example unit "
                f"{unit} by {who}; this run stored all others: run the same line again when that run has ended"
            )
