"""PartWriter: one of several stores that are filled from one pass, each with a projection of its own."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Unpack

from lightning import LightningModule

from icons.modules.gradient_writer import GradientWriter, GradientWriting
from icons.projection import ConcatProjector


class PartWriter(GradientWriter):
    """Stores one projector's part of what a `GradientExtractor` with `ConcatProjector` projectors predicts.

    The store is bit for bit the one that this projector alone would fill. A unit is computed if it is missing in one of
    the stores, so that runs that were stopped, and stores that were begun alone, are gone on with.

    Args:
        path: the store.
        part: the place of its projector among the extractor's.
        options: as for `GradientWriter`; `chunk_rows` must be given, the same for all.
    """

    def __init__(self, path: str, part: int, **options: Unpack[GradientWriting]) -> None:
        super().__init__(path, **options)
        self.part = part

    def describe(self, pl_module: LightningModule, datamodule: Any) -> dict[str, Any]:
        several = projectors(pl_module)
        described = super().describe(pl_module, datamodule)
        return described | {"projector": several.projectors[self.part].describe()}

    def own(self, outputs: Mapping[str, Any], pl_module: LightningModule) -> Mapping[str, Any]:
        """The batch with its part of each row."""
        return {**outputs, "gradient": projectors(pl_module).split(outputs["gradient"])[self.part]}


def projectors(module: Any) -> ConcatProjector:
    assert isinstance(module.projector, ConcatProjector)
    return module.projector


def part_path(path: str, dim: int) -> str:
    """Where the store of one of several dimensions lies (the original's OUT/dim1024/).

    >>> part_path("train.zarr", 1024), part_path("s3://bucket/train", 512)
    ('train-dim1024.zarr', 's3://bucket/train-dim512')
    """
    suffix = PurePosixPath(path).suffix
    return f"{path.removesuffix(suffix)}-dim{dim}{suffix}"
