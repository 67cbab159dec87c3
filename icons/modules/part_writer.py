"""PartWriter: one of several stores that are filled from one pass, each with a projection of its own."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from lightning import LightningModule, Trainer

from icons.modules.writer import GradientWriter
from icons.partition import Claim, UnitPlan
from icons.projection import Several


class PartWriter(GradientWriter):
    """Stores one projector's part of what a `GradientExtractor` with `Several` projectors predicts.

    The store is bit for bit the one that this projector alone would fill. A unit is computed if it is missing in one of
    the stores, so that runs that were stopped, and stores that were begun alone, are gone on with.

    Args:
        path: the store.
        part: the place of its projector among the extractor's.
        last: whether no further writer comes behind; it is the one that SIGTERM stops, when all have their rows.
        options: as for `GradientWriter`; `chunk_rows` must be given, the same for all.
    """

    def __init__(self, path: str, part: int, last: bool, **options: Any) -> None:
        super().__init__(path, **options)
        self.part, self.last = part, last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        before: UnitPlan | None = datamodule.plan if self.part else None
        super().setup(trainer, pl_module, stage)
        if before is not None:
            units = sorted({*before.units, *self.plan.units})
            datamodule.plan = UnitPlan(before.partition, units, either(before, self.plan))

    def describe(self, pl_module: LightningModule, datamodule: Any) -> dict[str, Any]:
        several = projectors(pl_module)
        described = super().describe(pl_module, datamodule)
        return described | {"projector": several.projectors[self.part].describe()}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.last:
            super().on_predict_start(trainer, pl_module)
        elif self.progress is not None:  # the first writer's: it has found the Trainer's bar still on
            plan: UnitPlan = trainer.datamodule.plan  # type: ignore[attr-defined]
            self.progress.start(sum(len(plan.partition.unit_rows(unit)) for unit in plan.units))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Mapping[str, Any],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes its part of the rows of a batch."""
        own = projectors(pl_module).split(outputs["gradient"])[self.part]
        super().on_predict_batch_end(trainer, pl_module, {**outputs, "gradient": own}, batch, batch_idx, dataloader_idx)


def projectors(module: Any) -> Several:
    assert isinstance(module.projector, Several)
    return module.projector


def either(first: UnitPlan, second: UnitPlan) -> Claim:
    """A unit is computed if one of two stores takes it; both are asked."""

    def claim(unit: int, patient: bool = False) -> bool:
        asked = [plan.claim is None or plan.claim(unit, patient) for plan in (first, second)]
        return any(asked)

    return claim


def part_path(path: str, dim: int) -> str:
    """Where the store of one of several dimensions lies (the original's OUT/dim1024/).

    >>> part_path("train.zarr", 1024), part_path("s3://bucket/train", 512)
    ('train-dim1024.zarr', 's3://bucket/train-dim512')
    """
    suffix = PurePosixPath(path).suffix
    return f"{path.removesuffix(suffix)}-dim{dim}{suffix}"
