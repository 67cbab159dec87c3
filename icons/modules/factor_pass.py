"""Kronecker factors through `Trainer.predict`: chosen rows in parts, each part's sums in a file, the factors of all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from icons.agreement import FACTORS, IMAGE_FILES, check_compatible, check_image_files
from icons.batch import Batch
from icons.choices import FactorLabels
from icons.gradients.covariances import CovarianceSums, covariance_sums, with_drawn_labels
from icons.kronecker import KroneckerFactors
from icons.manifest import versions
from icons.models.fingerprint import adapter_fingerprint, base_description
from icons.modules.computation import batches_of, check_trainer, computation
from icons.modules.factor_parts import FactorParts
from icons.modules.progress import RowProgress
from icons.modules.ranks import Run, launched_by, own_signals
from icons.modules.sharding import ShardedModule, end_lockstep
from icons.modules.store_writer import ask_to_stop, broadcast
from icons.partition import Partition, UnitPlan, assign, parse_shard
from icons.store.failures import failures_in

PARTS = 32


@dataclass(frozen=True)
class FactorSettings:
    """What factors are made of.

    Attributes:
        rows: drawn from the data file; None, or more than there are: all.
        labels: `drawn` from what the model predicts, or the data's `own`.
        width: sides of a layer up to this wide have whole covariances, wider ones diagonals.
        seed: of the rows, and of the labels.
    """

    rows: int | None = 2000
    labels: FactorLabels = "drawn"
    width: int = 1024
    seed: int = 0

    def chosen(self, num_rows: int) -> "ChosenRows":
        """The rows of a data file, ascending, in parts of equal size."""
        count = num_rows if self.rows is None else min(self.rows, num_rows)
        rows = np.sort(np.random.default_rng(self.seed).permutation(num_rows)[:count]).tolist()
        return ChosenRows(count, max(1, -(-count // PARTS)), tuple(rows))


@dataclass(frozen=True)
class ChosenRows(Partition):
    """Any rows of a data file, in units.

    >>> ChosenRows(3, 2, (1, 4, 6)).unit_rows(1)
    [6]
    """

    rows: tuple[int, ...] = ()

    def unit_rows(self, unit: int) -> Sequence[int]:  # type: ignore[override]  # any rows, where a store's follow
        return [self.rows[place] for place in super().unit_rows(unit)]


class FactorPass(ShardedModule):
    """Sums each batch's covariances.

    Args:
        model: any Hugging Face causal or image-text model; it is put into eval mode.
        settings: see there.
    """

    def __init__(self, model: nn.Module, settings: FactorSettings) -> None:
        super().__init__()
        self.model, self.settings = model.eval(), settings

    def predict_step(self, batch: Batch, batch_idx: int) -> CovarianceSums:
        """The sums over a batch; rows that could not be read count as left out."""
        failed = len(batch.get("failed_row", ()))
        if not len(batch["labels"]):
            return CovarianceSums(left_out=failed)
        if self.settings.labels == "drawn":
            batch = with_drawn_labels(self.model, batch, self.settings.seed)
        found = covariance_sums(self.model, batch, self.settings.width)
        found.left_out += failed
        return found

    def shapes(self) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in self.model.named_parameters() if value.requires_grad}

    def describe(self) -> dict[str, Any]:
        """The model's part of the manifest, and the settings."""
        adapter = {"fingerprint": adapter_fingerprint(self.model)}
        return {"model": base_description(self.model), "adapter": adapter, "factors": asdict(self.settings)}


class FactorWriter(Callback):
    """Writes a `FactorPass`'s factors to one file; the same line, run again, goes on.

    Rows are cut into 32 parts, of which each rank computes every so many. A part's sums are batch after batch, and go
    into a file of its own beside the factors; the factors are the sum of all parts in their order. So they are the same
    to the last bit for any number of ranks and after any kill, with the same batches and threads; with others they are
    the same to float32 rounding.

    Args:
        file: of the factors. A file that is there was made from the same, or is replaced.
        manifest: further entries.
        shard: "I/N": only the I-th (from 0) of N equal shares of the parts, for jobs that do not know of each other;
            the one that finishes last writes the factors.

    Attributes:
        lacking: parts that other shards have still to make, after which the factors can be written.
    """

    def __init__(self, file: Path, manifest: Mapping[str, Any] | None = None, shard: str | None = None) -> None:
        self.file, self.given = file, dict(manifest or {})
        self.shard = (0, 1) if shard is None else parse_shard(shard)
        self.lacking: list[int] = []
        self.manifest: dict[str, Any] = {}
        self.parts = FactorParts(file, {})
        self.plan = UnitPlan(Partition(0, 1), [])
        self.open: tuple[int, CovarianceSums] | None = None  # rows of the current part that have come, and their sums
        self.finished = 0
        self.reason = ""
        self.run: Run | None = None
        self.progress: RowProgress | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plans the work, on all ranks alike.

        Raises:
            ValueError: Trainer flags under which gradients would be wrong, or a folder of somebody else's where parts
                go.
        """
        check_trainer(trainer, type(self).__name__)
        own_signals(trainer)
        assert isinstance(pl_module, FactorPass)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.manifest = describe(trainer, pl_module) | self.given
        same = {name: self.manifest.get(name) for name in (*FACTORS, IMAGE_FILES, "batches", "computation", "versions")}
        self.parts = FactorParts(self.file, same | {"threads": torch.get_num_threads()})
        self.run = Run(launched_by(trainer.strategy))
        chosen = pl_module.settings.chosen(len(datamodule.dataset))
        todo = broadcast(trainer, self.prepare(chosen) if trainer.is_global_zero else None)
        if isinstance(todo, Exception):  # on every rank, since the others would wait for rank 0 for ever
            raise todo
        self.plan = datamodule.plan = UnitPlan(chosen, assign(todo, trainer.world_size, trainer.global_rank))
        self.progress = RowProgress(trainer)

    def prepare(self, chosen: ChosenRows) -> list[int] | Exception:
        """Parts of this shard of which no file was made from the same (rank 0), or what went wrong."""
        try:
            self.parts.enter()
            mine = assign(range(chosen.num_units), self.shard[1], self.shard[0])
            return [part for part in mine if self.parts.read(part) is None]
        except (ValueError, OSError) as error:
            return error

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.run is not None and self.progress is not None
        self.run.watch(lambda: ask_to_stop(trainer))
        self.progress.start(self.plan.num_rows)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.stop_between_parts(trainer)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds a batch's sums; writes the part when it is whole."""
        assert self.progress is not None
        came = len(batch["row"]) + len(batch.get("failed_row", ()))
        if not self.reason:
            self.reason = next(map(str, failures_in(batch)), "")
        seen, sums = self.open or (0, CovarianceSums())
        sums.add(outputs)
        self.open = (seen + came, sums)
        self.progress.advance(came)
        unit = self.plan.units[self.finished]
        if seen + came == len(self.plan.partition.unit_rows(unit)):
            self.parts.write(unit, sums, self.reason)
            self.open, self.finished = None, self.finished + 1
        self.stop_between_parts(trainer)

    def stop_between_parts(self, trainer: Trainer) -> None:
        if self.run is not None and self.run.stop_status is not None and self.open is None:
            self.end(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for all ranks' parts; the first adds them up, if no other shard has still to make some.

        Raises:
            ValueError: another rank has failed, or no row can be used.
            SystemExit: a rank was interrupted.
        """
        assert isinstance(pl_module, FactorPass)
        self.end(trainer)
        failed: Exception | None = None
        if trainer.is_global_zero:
            try:
                self.write(pl_module)
            except Exception as error:
                failed = error
        self.parts.leave()
        if found := broadcast(trainer, failed):
            raise found

    def write(self, module: FactorPass) -> None:
        """The factors of all parts."""
        datamodule: Any = module.trainer.datamodule  # type: ignore[attr-defined]
        parts = range(module.settings.chosen(len(datamodule.dataset)).num_units)
        self.lacking = [part for part in parts if self.shard[1] > 1 and not self.parts.path(part).exists()]
        if is_done(self.file, self.manifest, overwrite=True):  # another shard came to the end at the same time
            self.lacking = []
            return self.parts.remove()
        if self.lacking:
            return None
        total, reasons = CovarianceSums(), []
        for part in parts:
            found = self.parts.read(part)
            if found is None:
                if is_done(self.file, self.manifest, overwrite=True):
                    return None
                raise ValueError(
                    f"{self.parts.path(part)}: was there and is gone, or was made from something else; expected all "
                    "parts from the same line (but for --shard), batches, threads and versions: run its line again"
                )
            total.add(found[0])
            reasons.append(found[1])
        if not total.rows and (reason := next(filter(None, reasons), "")):
            raise ValueError(f"{self.file}: none of {total.left_out:,} rows can be used; the first, {reason}")
        about = {**self.manifest, "left_out": total.left_out}
        KroneckerFactors.of(total, module.shapes(), about).save(self.file)
        return self.parts.remove()

    def end(self, trainer: Trainer) -> None:
        """Ends the run with all other ranks."""
        assert self.run is not None and self.progress is not None
        try:
            self.run.end(end_lockstep(trainer))
        finally:
            self.progress.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Waits for the other ranks' work."""
        if self.run is not None:
            if isinstance(exception, Exception):
                end_lockstep(trainer)
            self.run.fail(exception)
        self.parts.leave()
        if self.progress is not None:
            self.progress.stop()


def describe(trainer: Trainer, module: FactorPass) -> dict[str, Any]:
    """What factors are made from and with."""
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    own = {"batches": batches_of(datamodule), "versions": versions()}
    return {**datamodule.describe(), **module.describe(), **computation(trainer, module), **own}


def is_done(file: Path, manifest: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether factors are there that were made from the same.

    Raises:
        ValueError: those there were made from something else, and are not to be overwritten.
    """
    if not file.is_file() or not file.stat().st_size:
        return False
    try:
        remedy = "expected both to be the same: mend one, give another place, or --overwrite"
        made = KroneckerFactors.load(file).manifest
        check_compatible(made, manifest, FACTORS, str(file), "this run", remedy)
        check_image_files(made, manifest, str(file))
    except ValueError:
        if overwrite:
            return False
        raise
    return True
