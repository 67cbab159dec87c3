"""StoreWriter: the callback that stores what `Trainer.predict` computes, and says which rows are still to do."""

import signal
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from icons.manifest import versions
from icons.modules.computation import adopt_threads, batches_of, check_batches, check_trainer, computation
from icons.modules.progress import RowProgress
from icons.modules.ranks import Run, launched_by, own_signals
from icons.modules.sharding import end_lockstep
from icons.partition import UnitPlan, assign, parse_shard
from icons.store import GradientStore, ScoreStore
from icons.store.failures import FailureLog, failures_in
from icons.store.image_files import renew_images
from icons.store.unit_writer import UnitWriter, statuses_of


class _NoInterval:
    """Tells Lightning that it need not remember the rows of every batch it has seen: each prediction names its own."""

    on_batch = on_epoch = False


class Writing(TypedDict, total=False):
    """What every writer may be told; see `StoreWriter`."""

    num_rows: int | None
    chunk_rows: int | None
    manifest: Mapping[str, Any] | None
    shard: str | None
    retry_failed: bool
    mixed_batches: bool
    overwrite: bool
    queue_units: int
    lease_timeout_s: float


class StoreWriter(BasePredictionWriter):
    """Stores the rows that a module predicts; a store that exists is gone on with. What kind of store, and how it is
    made, is said by `GradientWriter` and `ScoreWriter`.

    Before the first batch rank 0 opens or creates the store and finds the units still to do; every rank gets its share
    as `plan`, which is passed to the datamodule as `datamodule.plan`: `predict_dataloader` makes its batches from it
    (`UnitBatchSampler`). A finished unit is stored from a background thread while the next is computed.
    SIGTERM and SIGUSR1 finish the current unit and exit with status 75. All ranks end together: a rank that is done,
    has failed or was interrupted waits for the others, and then all have the same status.

    Behind another writer among the callbacks, both fill their stores from one pass: a unit is computed if it is missing
    in either.

    Args:
        path: the store: a folder, or a URL (s3://bucket/name).
        num_rows: records of the data file; default: `len(datamodule.dataset)`.
        chunk_rows: rows per unit; default: as suits the store.
        manifest: further entries; they win over what module and datamodule say with their `describe()`.
        shard: "I/N": only the I-th (from 0) of N equal shares of all units, for jobs that do not know of each other.
        retry_failed: also compute the units with failed rows.
        mixed_batches: go on with a store although batch size or token limit are not those it was begun with: rows then
            agree with those of one run to rounding, and no longer bit for bit. The manifest says so.
        overwrite: replace a store of other settings, and write beside files of another kind.
        queue_units: finished units that may wait to be written; with those being collected, the memory it takes.
        lease_timeout_s: after this time without a sign of life the unit of a run on another machine is taken over.
    """

    STORE: type[GradientStore] | type[ScoreStore]

    def __init__(
        self,
        path: str | Path,
        *,
        num_rows: int | None = None,
        chunk_rows: int | None = None,
        manifest: Mapping[str, Any] | None = None,
        shard: str | None = None,
        retry_failed: bool = False,
        mixed_batches: bool = False,
        overwrite: bool = False,
        queue_units: int = 2,
        lease_timeout_s: float = 90.0,
    ) -> None:
        super().__init__("batch")
        self.interval = _NoInterval()  # type: ignore[assignment]
        self.path, self.num_rows, self.chunk_rows, self.manifest = path, num_rows, chunk_rows, dict(manifest or {})
        self.shard = (0, 1) if shard is None else parse_shard(shard)
        self.retry_failed, self.queue_units, self.lease_timeout_s = retry_failed, queue_units, lease_timeout_s
        self.mixed_batches, self.overwrite = mixed_batches, overwrite
        self.store: GradientStore | ScoreStore | None = None
        self.plan: UnitPlan | None = None
        self.writer: UnitWriter | None = None
        self.failures: FailureLog | None = None
        self.progress: RowProgress | None = None
        self.run: Run | None = None  # of the last of several writers
        self.threads: int | None = None

    @abstractmethod
    def open_or_create(self, manifest: dict[str, Any], num_rows: int) -> GradientStore | ScoreStore:
        """The store at `path`, checked against what this run would write.

        Raises:
            ValueError: the store there was made from something else: the field and both values.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Opens the store and plans the work, on all ranks alike.

        Raises:
            ValueError: Trainer flags under which the rows would be wrong, a store made from something else, or one of
                other units than the store beside it.
        """
        super().setup(trainer, pl_module, stage)
        check_trainer(trainer, type(self).__name__)
        own_signals(trainer)
        if writers(trainer)[-1] is self:
            self.run = Run(launched_by(trainer.strategy))
        work = broadcast(trainer, self.prepare(trainer, pl_module) if trainer.is_global_zero else None)
        if isinstance(work, Exception):  # on every rank, since the others would wait for rank 0 for ever
            raise work
        self.store = self.STORE.open(self.path, mode="r+")
        self.threads = adopt_threads(trainer, self.store)
        again = work["again"]
        self.writer = UnitWriter(
            self.store, again=again, queue_units=self.queue_units, lease_timeout_s=self.lease_timeout_s
        )
        self.failures = FailureLog(self.store, again)
        if trainer.is_global_zero:
            self.writer.sweep()
        mine = assign(work["todo"], trainer.world_size, trainer.global_rank)
        self.plan = UnitPlan(self.store.partition, mine, self.writer.claim)
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is not None:
            datamodule.plan = self.plan if writers(trainer)[0] is self else self.beside(datamodule.plan)
        self.progress = RowProgress(trainer)

    def beside(self, plan: UnitPlan) -> UnitPlan:
        """This rank's work with that of the writers before this one."""
        assert self.plan is not None
        if plan.partition != self.plan.partition:
            raise ValueError(
                f"store {self.path}: has units of {self.plan.partition.chunk_rows} rows, the store beside it "
                f"{plan.partition.chunk_rows}; expected the same: give both a new place, or the same --chunk-rows"
            )
        return plan.union(self.plan)

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | Exception:
        """Opens or creates the store (rank 0); the units to do, or what went wrong."""
        try:
            datamodule: Any = getattr(trainer, "datamodule", None)
            manifest = self.describe(pl_module, datamodule) | computation(trainer, pl_module)
            store = self.open_or_create(manifest, self.num_rows or len(datamodule.dataset))
            renew_images(store, manifest)
            mine = set(assign(range(store.partition.num_units), self.shard[1], self.shard[0]))
            statuses = store.statuses()
            failed = sorted(mine & set(store.failed_units(statuses))) if self.retry_failed else []
            again = statuses_of(store, failed, statuses)
            todo = sorted(mine & set(store.missing()) | set(again))
            if todo:
                check_batches(store, batches_of(datamodule), self.mixed_batches)
            return {"todo": todo, "again": again}
        except Exception as error:
            return error

    def describe(self, pl_module: LightningModule, datamodule: Any) -> dict[str, Any]:
        """The manifest: what the rows are made from."""
        describes = [getattr(part, "describe", dict) for part in (datamodule, pl_module)]
        described = {name: value for describe in describes for name, value in describe().items()}
        settings = {"shards": self.shard[1], "chunk_rows": self.chunk_rows, "threads": torch.get_num_threads()}
        own = {"batches": batches_of(datamodule), "versions": versions(), "settings": settings}
        return {**described, **own, **self.manifest}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if writers(trainer)[-1] is self:
            assert self.run is not None
            self.run.watch(lambda: ask_to_stop(trainer))
        assert self.progress is not None and self.plan is not None
        plan: UnitPlan = getattr(getattr(trainer, "datamodule", None), "plan", None) or self.plan
        self.progress.start(plan.num_rows)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.stop_between_units(trainer)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the rows of a batch."""
        assert self.writer is not None and self.progress is not None
        outputs = self.own(outputs, pl_module)
        row = outputs["row"].cpu().numpy()
        assert self.failures is not None
        self.failures.add(row, failures_in(batch))
        self.writer.collect(row, {name: _as_numpy(outputs[name]) for name in self.STORE.FIELDS})
        self.progress.advance(len(row))
        self.stop_between_units(trainer)

    def own(self, outputs: Mapping[str, Any], pl_module: LightningModule) -> Mapping[str, Any]:
        """What of a batch's predictions this store keeps; here all."""
        return outputs

    def stop_between_units(self, trainer: Trainer) -> None:
        last = writers(trainer)[-1]
        asked = last.run is not None and last.run.stop_status is not None
        if asked and not any(writer.open_units for writer in _unit_writers(trainer)):
            last.end(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits until everything is stored, on every rank.

        Raises:
            OSError: a unit could not be stored.
            ValueError: a unit is incomplete, another run holds it, or another rank has failed.
            SystemExit: a rank was interrupted.
        """
        if writers(trainer)[-1] is self:
            self.end(trainer)

    def end(self, trainer: Trainer) -> None:
        """Ends the run, of all writers, with all other ranks."""
        assert self.run is not None
        error: Exception | None = end_lockstep(trainer)
        for writer in _unit_writers(trainer):
            try:
                writer.close()
                writer.check()
                if self.run.stop_status is None:
                    writer.finish()
            except Exception as failure:
                error = error or failure
        try:
            self.run.end(error)
        finally:
            self.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stores what was finished, gives the rest back, and waits for the other ranks' work."""
        if self.writer is not None:
            with suppress(Exception):  # a second error would hide the one that is under way
                self.writer.close()
        if self.run is not None:
            if isinstance(exception, Exception):
                end_lockstep(trainer)
            self.run.fail(exception)
        self.restore()

    def restore(self) -> None:
        """Gives back what was the Trainer's: its bar, and the process's threads."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
            self.threads = None
        if self.progress is not None:
            self.progress.stop()


def writers(trainer: Trainer) -> list[StoreWriter]:
    """All of a run, in order: the first plans anew; the last, which SIGTERM stops, has its rows when all have them."""
    return [callback for callback in trainer.callbacks if isinstance(callback, StoreWriter)]  # type: ignore[attr-defined]


def ask_to_stop(trainer: Trainer) -> None:
    """Has this rank, and those that it has started, end after the current unit."""
    for writer in _unit_writers(trainer):
        writer.leases.hurried = True
    for process in launched_by(trainer.strategy):
        process.send_signal(signal.SIGTERM)


def _unit_writers(trainer: Trainer) -> list[UnitWriter]:
    return [each.writer for each in writers(trainer) if each.writer is not None]


def broadcast(trainer: Trainer, value: Any) -> Any:
    return trainer.strategy.broadcast(value, src=0)


def _as_numpy(values: torch.Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
