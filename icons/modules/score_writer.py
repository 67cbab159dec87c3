"""ScoreWriter: the callback that stores exact scores while `Trainer.predict` computes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from icons.modules.exact_scorer import InfluenceScorer
from icons.modules.former_scores import FormerScores
from icons.modules.writer import GradientWriter, computation
from icons.store import ScoreStore
from icons.store.manifest import check_compatible

AGREE = (
    "data", "model", "adapter", "preconditioner", "target", "preprocessing", "tasks", "groups", "reduce", "normalize"
)  # fmt: skip


class ScoreWriter(GradientWriter):
    """Stores what an `InfluenceScorer` predicts, unit by unit, as `GradientWriter` stores gradients: the same units,
    ranks, shards, leases and resume. Behind a `GradientWriter` among the callbacks, the two fill their stores from one
    pass: a unit is computed if it is missing in either.

    Args:
        path: the store.
        former: columns that are taken over from another store, with all groups of the new one.
        groups: of the new store; only needed with `former`.
        options: as for `GradientWriter`.
    """

    STORE = ScoreStore

    def __init__(
        self,
        path: str | Path,
        *,
        former: FormerScores | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, **options)
        self.former, self.groups = former, groups or {}

    def own(self, outputs: Mapping[str, Any], pl_module: LightningModule) -> Mapping[str, Any]:
        """The batch with what a former store has of its rows."""
        if self.former is None:
            return outputs
        assert isinstance(pl_module, InfluenceScorer)
        return self.former.widened(outputs, list(pl_module.tasks.columns))

    def open_or_create(self, trainer: Trainer, pl_module: LightningModule) -> ScoreStore:
        """The score store at `path`.

        Raises:
            ValueError: the store there was made from something else: the field and both values.
        """
        assert isinstance(pl_module, InfluenceScorer)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        manifest, columns = self.describe(pl_module, datamodule), list(pl_module.tasks.columns)
        manifest |= computation(trainer, pl_module)
        if self.former is not None:
            manifest, columns = self.former.manifest(manifest, self.groups), list(self.former.columns)

        def create() -> None:
            ScoreStore.create(
                self.path,
                num_rows=self.num_rows or len(datamodule.dataset),
                tasks=columns,
                manifest=manifest,
                chunk_rows=self.chunk_rows or 1024,
                extra={"norm": ("float32", []), "loss": ("float32", []), "tokens": ("int32", [])},
                overwrite=self.overwrite,
            )

        def check(store: ScoreStore) -> None:
            agree = [*AGREE, *(["computation"] if "computation" in store.manifest else [])]
            check_compatible(store.manifest, manifest, agree, f"the score store {self.path}", "this run")

        return ScoreStore.taken_up(self.path, check, create, self.overwrite)
