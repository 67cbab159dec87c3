"""Exact influence through `Trainer.predict`: task vectors from validation rows, then training rows against them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from icons.batch import Batch
from icons.choices import Reduce
from icons.gradients import TaskMatrix, scored_gradients
from icons.modules.sample_module import SampleModule
from icons.modules.task_directions import TaskSpan, each
from icons.modules.task_vectorizer import TaskVector
from icons.preconditioner import Preconditioner, described
from icons.projection import Projector


@dataclass(frozen=True)
class ScoredTasks:
    """The tasks that rows are scored against.

    Attributes:
        vectors: name -> task vector.
        spans: name -> span; then scores are cosines within the tasks' spans, and the vectors only tell whose they are.
        groups: name -> members, scored as one task.
        reduce: how a group's members become one: their highest (as the original does for MME), or their mean.
        dtype: of the task vectors on the device; bfloat16 halves S x P.
        offload: keep them in the CPU's memory.
    """

    vectors: Mapping[str, TaskVector]
    spans: Mapping[str, TaskSpan] = field(default_factory=dict, kw_only=True)
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

    def matrix(self, model: nn.Module) -> TaskMatrix:
        """What gradients are multiplied with: the tasks' vectors, or all directions of their spans."""
        vectors = [task.vector for task in self.vectors.values()]
        directions = [direction for span in self.spans.values() for direction in each(span.directions)]
        return TaskMatrix(model, directions if self.spans else vectors, self.dtype, self.offload)

    def scores(self, products: Tensor, norm: Tensor, unit: bool) -> Tensor:
        """Products with the matrix -> scores of the columns `[B, S]`; NaN for a gradient that is zero or not finite."""
        if not self.spans:
            return self.reduced(products / norm[:, None] if unit else products)
        parts = products.split([len(span.mean) for span in self.spans.values()], dim=1)
        inside = [
            functional.normalize(part, dim=1) @ span.mean.to(part)
            for part, span in zip(parts, self.spans.values(), strict=True)
        ]
        usable = norm.isfinite() & (norm > 0)
        return self.reduced(torch.stack(inside, dim=1)).masked_fill(~usable[:, None], torch.nan)

    @property
    def columns(self) -> dict[str, list[str]]:
        """Column -> the tasks that it is made of: tasks that are in no group, then the groups."""
        return columns_of(self.vectors, self.groups)

    def reduced(self, products: Tensor) -> Tensor:
        """Products with each task `[B, tasks]` -> scores of the columns `[B, S]`."""
        column = {name: number for number, name in enumerate(self.vectors)}
        parts = [products[:, [column[member] for member in members]] for members in self.columns.values()]
        return torch.stack([p.amax(dim=1) if self.reduce == "max" else p.mean(dim=1) for p in parts], dim=1)


def columns_of(tasks: Iterable[str], groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Column -> its tasks: those in no group, then the groups.

    >>> columns_of(["a", "b", "c"], {"ab": ["a", "b"]})
    {'c': ['c'], 'ab': ['a', 'b']}
    """
    grouped = {member for members in groups.values() for member in members}
    alone = {name: [name] for name in tasks if name not in grouped}
    return alone | {name: list(members) for name, members in groups.items()}


class InfluenceScorer(SampleModule):
    """Scores training rows on all tasks inside the backward pass: exact, without projection.

    Args:
        model: any Hugging Face causal or image-text model.
        tasks: task vectors, made with the same model.
        preconditioner: for the training rows, as in `GradientExtractor`.
        unit: divide by each row's norm (cosine similarity); False: the inner product.
        projector: also give the projected gradients, from the same backward pass, for a `GradientWriter`.

    Memory: S x P numbers beside the model. For LLaVA-1.5-7B at r = 128 (P = 320 M) 10 tasks take 12.8 GB in float32
    and 6.4 GB in bfloat16, 22 tasks 28.1 and 14.1 GB; `offload` keeps them in the CPU's memory. Within spans S is the
    number of all tasks' directions.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: ScoredTasks,
        preconditioner: Preconditioner | None = None,
        unit: bool = True,
        projector: Projector | None = None,
    ) -> None:
        super().__init__(model)
        self.tasks, self.unit, self.keep, self.preconditioner = tasks, unit, projector, preconditioner
        self.matrix: TaskMatrix | None = None

    def on_predict_start(self) -> None:
        super().on_predict_start()
        self.matrix = self.tasks.matrix(self.model)

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        """`influence [B, S]` float32, `stderr [B, S]` zeros (nothing is estimated), `norm`, `loss`, `tokens`; with a
        projector also `gradient [B, K]`."""
        assert self.matrix is not None
        products, norm, sample = scored_gradients(self.model, batch, self.matrix, self.preconditioner, self.keep)
        assert sample is not None
        influence = self.tasks.scores(products, norm, self.unit)
        return {
            "influence": influence,
            "stderr": torch.zeros_like(influence),
            "norm": norm,
            "loss": sample.loss,
            "tokens": sample.tokens.int(),
            **({} if self.keep is None else {"gradient": sample.gradient}),
        }

    def describe(self) -> dict[str, Any]:
        kept = {} if self.keep is None else {"projector": self.keep.describe()}
        tasks = {name: {"num_rows": task.num_rows, **task.manifest} for name, task in self.tasks.vectors.items()}
        groups = {name: list(members) for name, members in self.tasks.groups.items()}
        columns = self.tasks.columns
        return {
            **super().describe(),
            **kept,
            "preconditioner": described(self.preconditioner),
            "tasks": tasks,
            "groups": groups,
            "reduce": self.tasks.reduce,
            "normalize": "exact" if self.unit else "none",
            "num_validation": [sum(self.tasks.vectors[m].num_rows for m in members) for members in columns.values()],
        }
