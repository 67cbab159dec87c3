"""What the manifests of gradient and score stores state (`attrs["icons"]`)."""

from typing import Any

import msgspec

from icons.choices import Normalize, Reduce
from icons.manifest import DataEntry, Manifest


class WeightsEntry(msgspec.Struct, frozen=True):
    """A model, or its adapter."""

    fingerprint: str = "?"


class ProjectorEntry(msgspec.Struct, frozen=True):
    """How gradients became rows."""

    kind: str = "?"
    dim: int | None = None
    seed: int | None = None


class RunEntry(msgspec.Struct, frozen=True):
    """The run that began the store."""

    shards: int | None = None
    threads: int | None = None


class StoreManifest(Manifest, frozen=True, kw_only=True):
    """What a gradient store states, and a score store likewise."""

    data: DataEntry = DataEntry()
    model: WeightsEntry = WeightsEntry()
    adapter: WeightsEntry = WeightsEntry()
    projector: ProjectorEntry = ProjectorEntry()
    settings: RunEntry = RunEntry()
    dtype: str | None = None
    image_files: dict[str, dict[str, str | None]] = {}
    batches: dict[str, Any] | str | None = None
    warnings: list[str] = []


class ScoreManifest(StoreManifest, frozen=True, kw_only=True):
    """What a score store states besides: its sources, and how they became scores."""

    dim: int | None = None
    num_validation: list[int] = []
    normalize: Normalize = "projected"
    task_normalize: Normalize | None = None
    weights: list[float] = []
    groups: dict[str, list[str]] = {}
    reduce: Reduce = "max"
    drop_axes: int = 0
    subspace: float | None = None
    train: list[dict[str, Any]] = []
    tasks: dict[str, Any] = {}

    def members(self, column: str) -> list[str]:
        """The tasks that a column is made of."""
        return self.groups.get(column, [column])
