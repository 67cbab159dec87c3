"""Exact influence through `Trainer.predict`: task vectors from validation rows, then training rows against them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from icons.batch import Batch
from icons.gradients import TaskMatrix, scored_gradients, weighted_gradient
from icons.modules.extractor import GradientExtractor
from icons.modules.former_scores import FormerScores
from icons.modules.writer import GradientWriter
from icons.partition import Claim, UnitPlan
from icons.preconditioner import Preconditioner
from icons.projection import Identity, Projector
from icons.store import ScoreStore
from icons.store.manifest import check_compatible

Reduce = Literal["max", "mean"]
AGREE = (
    "data",
    "model",
    "adapter",
    "preconditioner",
    "target",
    "preprocessing",
    "tasks",
    "groups",
    "reduce",
    "normalize",
)


@dataclass
class TaskVector:
    """The mean of a task's (unit) gradients, one tensor per trainable parameter.

    Attributes:
        vector: parameter name -> float32 tensor of its shape, on the CPU.
        num_rows: validation rows that the mean is over; failed rows do not count.
        manifest: what it was made from.
    """

    vector: dict[str, Tensor]
    num_rows: int
    manifest: dict[str, Any]

    def save(self, file: Path) -> None:
        """Writes safetensors with the manifest in its metadata; atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        about = {"num_rows": str(self.num_rows), "manifest": json.dumps(self.manifest)}
        save_file({name: value.contiguous() for name, value in self.vector.items()}, partial, about)
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> "TaskVector":
        with safe_open(file, framework="pt") as tensors:
            about = tensors.metadata()
            vector = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        return cls(vector, int(about["num_rows"]), json.loads(about["manifest"]))


class TaskVectorizer(LightningModule):
    """Adds up the unit gradients of each task's rows; no per-sample gradient is kept.

    The mean over validation rows is linear: per batch one streaming pass gives the norms, and one ordinary batched
    backward pass of sum_i loss_i / |g_i| the sum of the unit gradients.

    Args:
        model: any Hugging Face causal or image-text model.
        tasks: names, in the order of the dataloaders.
        unit: divide each row's gradient by its norm; False: the mean of plain gradients.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[str], unit: bool = True) -> None:
        super().__init__()
        self.model, self.tasks, self.unit = model.eval(), list(tasks), unit
        self.totals: dict[str, dict[str, Tensor]] = {}
        self.counts = dict.fromkeys(self.tasks, 0)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        task = self.tasks[dataloader_idx]
        _, norm, _ = scored_gradients(self.model, batch, TaskMatrix(self.model, []))
        good = norm.isfinite() & (norm > 0)
        weights = torch.where(good, 1 / norm if self.unit else torch.ones_like(norm), 0)
        found = weighted_gradient(self.model, batch, weights)
        total = self.totals.setdefault(task, {})
        for name, value in found.items():
            total[name] = total[name] + value if name in total else value
        self.counts[task] += int(good.sum())

    def vector(self, task: str, manifest: dict[str, Any]) -> TaskVector:
        """The mean of one task.

        Raises:
            ValueError: no row of the task has a gradient.
        """
        count = self.counts[task]
        if count == 0:
            raise ValueError(f"task {task}: no validation row has a finite gradient; expected at least one usable row")
        return TaskVector({name: value.cpu() / count for name, value in self.totals[task].items()}, count, manifest)


@dataclass(frozen=True)
class ScoredTasks:
    """The tasks that rows are scored against.

    Attributes:
        vectors: name -> task vector.
        groups: name -> members, scored as one task.
        reduce: how a group's members become one: their highest (as the original does for MME), or their mean.
        dtype: of the task vectors on the device; bfloat16 halves S x P.
        offload: keep them in the CPU's memory.
    """

    vectors: Mapping[str, TaskVector]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    reduce: Reduce = "max"
    dtype: torch.dtype = torch.float32
    offload: bool = False

    def __post_init__(self) -> None:
        for name, members in self.groups.items():
            unknown = [member for member in members if member not in self.vectors]
            if unknown or not members:
                raise ValueError(
                    f"group {name}: got {', '.join(members) or 'no tasks'}; expected tasks out of "
                    f"{', '.join(self.vectors)}"
                )

    @property
    def columns(self) -> dict[str, list[str]]:
        """Column -> the tasks that it is made of: tasks that are in no group, then the groups."""
        return columns_of(self.vectors, self.groups)

    def reduced(self, products: Tensor) -> Tensor:
        """Products with each task `[B, tasks]` -> scores of the columns `[B, S]`."""
        place = {name: number for number, name in enumerate(self.vectors)}
        parts = [products[:, [place[member] for member in members]] for members in self.columns.values()]
        return torch.stack([p.amax(dim=1) if self.reduce == "max" else p.mean(dim=1) for p in parts], dim=1)


def columns_of(tasks: Iterable[str], groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Column -> its tasks: those in no group, then the groups.

    >>> columns_of(["a", "b", "c"], {"ab": ["a", "b"]})
    {'c': ['c'], 'ab': ['a', 'b']}
    """
    grouped = {member for members in groups.values() for member in members}
    alone = {name: [name] for name in tasks if name not in grouped}
    return alone | {name: list(members) for name, members in groups.items()}


class InfluenceScorer(GradientExtractor):
    """Scores training rows on all tasks inside the backward pass: exact, without projection.

    Args:
        model: any Hugging Face causal or image-text model.
        tasks: task vectors, made with the same model.
        preconditioner: for the training rows, as in `GradientExtractor`.
        unit: divide by each row's norm (cosine similarity); False: the inner product.
        projector: also give the projected gradients, from the same backward pass, for a `GradientWriter`.

    Memory: S x P numbers beside the model. For LLaVA-1.5-7B at r = 128 (P = 320 M) 10 tasks take 12.8 GB in float32
    and 6.4 GB in bfloat16, 22 tasks 28.1 and 14.1 GB; `offload` keeps them in the CPU's memory.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: ScoredTasks,
        preconditioner: Preconditioner | None = None,
        unit: bool = True,
        projector: Projector | None = None,
    ) -> None:
        super().__init__(model, projector or Identity(), preconditioner)
        self.tasks, self.unit, self.keep = tasks, unit, projector
        self.matrix: TaskMatrix | None = None

    def on_predict_start(self) -> None:
        super().on_predict_start()
        vectors = [task.vector for task in self.tasks.vectors.values()]
        self.matrix = TaskMatrix(self.model, vectors, self.tasks.dtype, self.tasks.offload)

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        """`influence [B, S]` float32, `stderr [B, S]` zeros (nothing is estimated), `norm`, `loss`, `tokens`; with a
        projector also `gradient [B, K]`."""
        assert self.matrix is not None
        products, norm, found = scored_gradients(self.model, batch, self.matrix, self.preconditioner, self.keep)
        assert found is not None
        influence = self.tasks.reduced(products / norm[:, None] if self.unit else products)
        return {
            "influence": influence,
            "stderr": torch.zeros_like(influence),
            "norm": norm,
            "loss": found.loss,
            "tokens": found.tokens.int(),
            **({} if self.keep is None else {"gradient": found.gradient}),
        }

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        if self.keep is None:
            del described["projector"]
        tasks = {name: {"num_rows": task.num_rows, **task.manifest} for name, task in self.tasks.vectors.items()}
        groups = {name: list(members) for name, members in self.tasks.groups.items()}
        columns = self.tasks.columns
        return {
            **described,
            "tasks": tasks,
            "groups": groups,
            "reduce": self.tasks.reduce,
            "normalize": "exact" if self.unit else "none",
            "num_validation": [sum(self.tasks.vectors[m].num_rows for m in members) for members in columns.values()],
        }


def either(first: UnitPlan, second: UnitPlan) -> Claim:
    """A unit is computed if one of two stores takes it."""

    def claim(unit: int, patient: bool = False) -> bool:
        asked = [plan.claim is None or plan.claim(unit, patient) for plan in (first, second)]
        return any(asked)

    return claim


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

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the rows of a batch, with what a former store has of them."""
        if self.former is not None:
            assert isinstance(pl_module, InfluenceScorer)
            outputs = self.former.widened(outputs, list(pl_module.tasks.columns))
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As `GradientWriter.setup`.

        Raises:
            ValueError: the two stores have other units.
        """
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        first: UnitPlan | None = getattr(datamodule, "plan", None)
        super().setup(trainer, pl_module, stage)
        if first is None:
            return
        own = self.plan
        if first.partition != own.partition:
            raise ValueError(
                f"score store {self.path}: has units of {own.partition.chunk_rows} rows, the gradient store beside it "
                f"{first.partition.chunk_rows}; expected the same: give both a new place, or the same --chunk-rows"
            )
        datamodule.plan = UnitPlan(own.partition, sorted({*first.units, *own.units}), either(first, own))

    def open_or_create(self, trainer: Trainer, pl_module: LightningModule) -> ScoreStore:
        """The score store at `path`.

        Raises:
            ValueError: the store there was made from something else: the field and both values.
        """
        assert isinstance(pl_module, InfluenceScorer)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        manifest, columns = self.describe(pl_module, datamodule), list(pl_module.tasks.columns)
        if self.former is not None:
            manifest, columns = self.former.manifest(manifest, self.groups), list(self.former.columns)
        try:
            store = ScoreStore.open(self.path, mode="r+")
        except FileNotFoundError:
            return ScoreStore.create(
                self.path,
                num_rows=self.num_rows or len(datamodule.dataset),
                tasks=columns,
                manifest=manifest,
                chunk_rows=self.chunk_rows or 1024,
                extra={"norm": ("float32", []), "loss": ("float32", []), "tokens": ("int32", [])},
            )
        check_compatible(store.manifest, manifest, AGREE, f"the score store {self.path}", "this run")
        return store
