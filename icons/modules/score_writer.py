"""ScoreWriter: the callback that stores exact scores while `Trainer.predict` computes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from lightning import LightningModule

from icons.agreement import EXACT_SCORES, check_compatible
from icons.modules.exact_scorer import InfluenceScorer
from icons.modules.former_scores import FormerScores
from icons.modules.store_writer import StoreWriter, Writing
from icons.store import ScoreStore
from icons.store.image_files import check_images


class ScoreWriter(StoreWriter):
    """Stores what an `InfluenceScorer` predicts; a store that exists is gone on with.

    Behind a `GradientWriter` among the callbacks, the two fill their stores from one pass.

    Args:
        path: the store.
        former: columns that are taken over from another store, with all groups of the new one.
        groups: of the new store; only needed with `former`.
        options: as for `StoreWriter`.
    """

    STORE = ScoreStore

    def __init__(
        self,
        path: str | Path,
        *,
        former: FormerScores | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        **options: Unpack[Writing],
    ) -> None:
        super().__init__(path, **options)
        self.former, self.groups = former, groups or {}
        self.columns: list[str] = []

    def own(self, outputs: Mapping[str, Any], pl_module: LightningModule) -> Mapping[str, Any]:
        """The batch with what a former store has of its rows."""
        if self.former is None:
            return outputs
        assert isinstance(pl_module, InfluenceScorer)
        widened = self.former.widened(outputs, list(pl_module.tasks.columns))
        self.former.store.check_same()
        return widened

    def describe(self, pl_module: LightningModule, datamodule: Any) -> dict[str, Any]:
        """With what a former store adds: `columns` are those of the new one."""
        assert isinstance(pl_module, InfluenceScorer)
        manifest = super().describe(pl_module, datamodule)
        self.columns = list(pl_module.tasks.columns)
        if self.former is None:
            return manifest
        self.columns = list(self.former.columns)
        return self.former.manifest(manifest, self.groups)

    def open_or_create(self, manifest: dict[str, Any], num_rows: int) -> ScoreStore:
        def create() -> None:
            ScoreStore.create(
                self.path,
                num_rows=num_rows,
                tasks=self.columns,
                manifest=manifest,
                chunk_rows=self.chunk_rows or 1024,
                extra={"norm": ("float32", []), "loss": ("float32", []), "tokens": ("int32", [])},
                overwrite=self.overwrite,
            )

        def check(store: ScoreStore) -> None:
            agree = [*EXACT_SCORES, *(["computation"] if "computation" in store.manifest else [])]
            check_compatible(store.manifest, manifest, agree, f"the score store {self.path}", "this run")
            check_images(store, manifest)

        return ScoreStore.taken_up(self.path, check, create, self.overwrite)
