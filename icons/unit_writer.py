"""UnitWriter: collects rows into units and stores finished units from a background thread."""

import queue
import threading
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from icons.lease import Leases
from icons.store import GradientStore

FIELDS = {"gradient": np.float32, "norm": np.float32, "loss": np.float32, "tokens": np.int32, "status": np.uint8}


class OpenUnit:
    """A unit of which some rows have arrived."""

    def __init__(self, num_rows: int, dim: int) -> None:
        shapes = {name: (num_rows, dim) if name == "gradient" else (num_rows,) for name in FIELDS}
        self.values = {name: np.zeros(shapes[name], dtype) for name, dtype in FIELDS.items()}
        self.arrived = np.zeros(num_rows, dtype=bool)

    def add(self, position: np.ndarray, values: Mapping[str, np.ndarray]) -> bool:
        """Puts rows at their positions; whether the unit is whole now."""
        for name in FIELDS:
            self.values[name][position] = values[name]
        self.arrived[position] = True
        return bool(self.arrived.all())


class UnitWriter:
    """Stores units while the next ones are computed.

    Memory: `queue_units` finished units, one that is being written, and those that are being collected (one, where
    batches come unit after unit), whatever the number of rows.

    Args:
        store: opened for writing.
        again: units to be written although they are not missing (failed rows to be retried).
        queue_units: finished units that may wait; `collect` waits when there are more.
        lease_timeout_s: see `Leases`.
        on_unit: called with the number of rows after each unit is stored, from the background thread.
    """

    def __init__(
        self,
        store: GradientStore,
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
        self.error: BaseException | None = None
        self.waiting: queue.Queue[tuple[int, dict[str, np.ndarray]] | None] = queue.Queue(queue_units)
        self.thread = threading.Thread(target=self.work, name="icons-writer", daemon=True)
        self.thread.start()

    def claim(self, unit: int, patient: bool = False) -> bool:
        """Whether this run is to compute `unit`: it holds the lease, and nobody has finished the unit meanwhile.

        Args:
            unit: which.
            patient: watch an owner on another machine until it has moved, or is given up.
        """
        if unit in self.leases.held:
            return True
        if not (self.leases.acquire_patiently(unit) if patient else self.leases.acquire(unit)):
            self.elsewhere[unit] = str(self.leases.holder(unit) or "another run")
            return False
        self.elsewhere.pop(unit, None)
        if unit not in self.again and self.store.is_written(unit):
            self.leases.release(unit, done=True)
            return False
        return True

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
            opened = self.open_units.setdefault(unit, OpenUnit(len(rows), self.store.dim))
            here = units == unit
            if opened.add(row[here] - rows.start, {name: values[name][here] for name in FIELDS}):
                self.pass_on(unit, self.open_units.pop(unit).values)

    def pass_on(self, unit: int, values: dict[str, np.ndarray]) -> None:
        while True:
            self.check()
            try:
                return self.waiting.put((unit, values), timeout=0.2)
            except queue.Full:
                continue

    def work(self) -> None:
        """The background thread: stores what is passed on; after an error it only empties the queue."""
        while (item := self.waiting.get()) is not None:
            unit, values = item
            if self.error is None:
                try:
                    self.store_unit(unit, values)
                except BaseException as error:
                    self.error = error

    def store_unit(self, unit: int, values: dict[str, np.ndarray]) -> None:
        if not self.leases.owns(unit):
            self.elsewhere[unit] = str(self.leases.holder(unit) or "another run")
            return
        self.store.write_unit(unit, values)
        self.leases.release(unit, done=True)
        if self.on_unit is not None:
            self.on_unit(len(values["status"]))

    def check(self) -> None:
        """Raises the background thread's error, with what it means."""
        if self.error is None:
            return
        if isinstance(self.error, OSError) and self.error.errno is not None:
            message = (
                f"store {self.store.path}: could not be written ({self.error.strerror}); finished units are kept: "
                "mend the cause, and run the same line again to resume"
            )
            raise OSError(self.error.errno, message) from self.error
        raise self.error

    def close(self) -> None:
        """Waits until everything that was passed on is stored; gives back the leases of units that are not finished."""
        if self.thread.is_alive():
            self.waiting.put(None)
            self.thread.join()
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
