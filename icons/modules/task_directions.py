"""Directions among the whole gradients of tasks' validation rows: the axes and spans of `icons.scores`, exactly.

A direction is a weighted sum of validation rows. Which sums to take is worked out on the rows' projections (`[M, K]`,
from one pass); a second pass adds up the whole gradients with these coefficients, and the sums are made orthonormal. So
no pass holds more than one batch's gradients and the directions themselves.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icons.batch import Batch
from icons.gradients import TaskMatrix, combined_gradients, scored_gradients
from icons.models.fingerprint import num_trainable
from icons.modules.task_vectorizer import TaskPass, TaskVector, add_to
from icons.projection import CountSketch, Identity, Projector
from icons.scores.axes import axis_coefficients
from icons.scores.span import span_coefficients
from icons.scores.task_means import SAMPLE_ROWS

DIM = 8192
"""Numbers of a validation row's projection; models with no more trainable numbers are not projected."""
_SMALLEST = 1e-6
"""A direction that holds less than this share of the strongest one's squared length is rounding."""

Directions = dict[str, Float[Tensor, "directions ..."]]
"""Parameter name -> `[r, *shape]` float32, on the CPU; orthonormal over all parameters together."""


@dataclass(frozen=True)
class TaskSpan:
    """A task's span of whole gradients.

    Attributes:
        directions: orthonormal, r of them.
        mean: `[r]` the mean of the task's validation rows within the span, each of length 1.
    """

    directions: Directions
    mean: Float[Tensor, " directions"]


class TaskSketcher(TaskPass):
    """`rows [M, K]` projected gradients, divided by their exact norm if `unit`, and `norm [M]`; NaN for failed rows.

    Args:
        model: see `TaskPass`.
        tasks: name -> number of rows.
        unit: see above.
    """

    def __init__(self, model: nn.Module, tasks: Mapping[str, int], unit: bool = True) -> None:
        super().__init__(model, tasks)
        self.unit, self.projector = unit, sketch_of(model)
        self.rows: dict[str, Tensor] = {}
        self.norm = {task: torch.full((count,), torch.nan) for task, count in tasks.items()}

    def visit(self, task: str, batch: Batch) -> None:
        _, norm, projected = scored_gradients(self.model, batch, TaskMatrix(self.model, []), projector=self.projector)
        assert projected is not None
        good = norm.isfinite() & (norm > 0)
        rows = (projected.gradient / norm[:, None] if self.unit else projected.gradient)[good].cpu()
        if task not in self.rows:
            self.rows[task] = torch.full((len(self.norm[task]), rows.shape[1]), torch.nan)
        rows_here = batch["row"][good].cpu()
        self.rows[task][rows_here], self.norm[task][rows_here] = rows, norm[good].cpu()

    def vector(self, task: str, manifest: dict[str, Any]) -> TaskVector:
        norm = self.norm[task]
        return TaskVector({"rows": self.rows.get(task, torch.zeros(len(norm), 0)), "norm": norm}, len(norm), manifest)


class TaskCombiner(TaskPass):
    """Sums of each task's whole gradients: parameter name -> `[r, *shape]`.

    Args:
        model, tasks: see `TaskPass`.
        coefficients: task -> `[M, r]`.
    """

    def __init__(self, model: nn.Module, tasks: Iterable[str], coefficients: Mapping[str, Tensor]) -> None:
        super().__init__(model, tasks)
        self.coefficients = dict(coefficients)
        self.sums: dict[str, dict[str, Tensor]] = {task: {} for task in self.tasks}

    def visit(self, task: str, batch: Batch) -> None:
        sums = combined_gradients(self.model, batch, self.coefficients[task][batch["row"].cpu()])
        add_to(self.sums[task], {name: value.cpu() for name, value in sums.items()})

    def vector(self, task: str, manifest: dict[str, Any]) -> TaskVector:
        return TaskVector(self.sums[task], len(self.coefficients[task]), manifest)


class TaskLocator(TaskPass):
    """`rows [M, r]`: each task's unit gradients in coordinates of its own directions; NaN for failed rows.

    Args:
        model: see `TaskPass`.
        tasks: name -> number of rows.
        directions: of each task.
    """

    def __init__(self, model: nn.Module, tasks: Mapping[str, int], directions: Mapping[str, Directions]) -> None:
        super().__init__(model, tasks)
        self.directions = {task: each(directions[task]) for task in tasks}
        self.matrix: tuple[str, TaskMatrix] | None = None
        self.rows = {task: torch.full((count, len(self.directions[task])), torch.nan) for task, count in tasks.items()}

    def visit(self, task: str, batch: Batch) -> None:
        if self.matrix is None or self.matrix[0] != task:
            self.matrix = task, TaskMatrix(self.model, self.directions[task])
        product, norm, _ = scored_gradients(self.model, batch, self.matrix[1])
        self.rows[task][batch["row"].cpu()] = (product / norm[:, None]).cpu()

    def vector(self, task: str, manifest: dict[str, Any]) -> TaskVector:
        return TaskVector({"rows": self.rows[task]}, len(self.rows[task]), manifest)


def sketch_of(model: nn.Module) -> Projector:
    """How validation rows are projected to find directions among them."""
    return Identity() if num_trainable(model) <= DIM else CountSketch(DIM, seed=0)


def each(directions: Directions) -> list[dict[str, Tensor]]:
    """The directions one by one, as views."""
    count = len(next(iter(directions.values())))
    return [{name: value[number] for name, value in directions.items()} for number in range(count)]


def of_axes(sketches: Mapping[str, Mapping[str, Tensor]], count: int, unit: bool) -> dict[str, Tensor]:
    """Task -> `[M, count]`, coefficients of whole gradients that give the leading axes, see `icons.scores.axes`; as
    there, of up to 256 evenly spaced rows of each task.

    Raises:
        ValueError: the rows do not vary along so many axes.
    """
    kept = {}
    for task, sketch in sketches.items():
        usable = sketch["norm"].isfinite().nonzero()[:, 0]
        step = -(-len(sketch["norm"]) // SAMPLE_ROWS)
        kept[task] = usable[usable % step == 0]
    of_axes_rows = axis_coefficients([sketches[task]["rows"][rows] for task, rows in kept.items()], count)
    coefficients = {task: torch.zeros(len(sketches[task]["norm"]), count, dtype=torch.float64) for task in kept}
    for (task, rows), part in zip(kept.items(), of_axes_rows, strict=True):
        coefficients[task][rows] = part / sketches[task]["norm"][rows, None] if unit else part
    return coefficients


def of_span(sketch: Mapping[str, Tensor], share: float) -> Float[Tensor, "validation directions"]:
    """`[M, r]`, coefficients of whole gradients that give the span's directions, see `icons.scores.span`."""
    return span_coefficients(sketch["rows"], share) / sketch["norm"].nan_to_num(nan=1.0)[:, None]


def orthonormal(sums: Sequence[Mapping[str, Float[Tensor, "sums ..."]]]) -> Directions:
    """The sums of several tasks added up and made orthonormal; fewer, if some are sums of the others.

    >>> orthonormal([{"w": torch.tensor([[3.0, 0.0], [3.0, 4.0]])}])["w"].shape
    torch.Size([2, 2])
    """
    total = {name: torch.stack([part[name] for part in sums]).sum(dim=0) for name in sums[0]}
    flat = {name: value.flatten(1).double() for name, value in total.items()}
    gram = torch.stack([value @ value.T for value in flat.values()]).sum(dim=0)
    values, vectors = torch.linalg.eigh(gram)
    kept = (values > values[-1].clamp(min=1e-30) * _SMALLEST).nonzero()[:, 0].flip(0)
    turn = (vectors[:, kept] / values[kept].sqrt()).T
    return {name: (turn @ flat[name]).float().reshape(len(kept), *value.shape[1:]) for name, value in total.items()}


def without_axes(task: TaskVector, axes: Directions) -> TaskVector:
    """The task vector's part that is at right angles to all axes."""
    along = torch.stack([axes[name].flatten(1).double() @ task.vector[name].flatten().double() for name in axes])
    share = along.sum(dim=0).float()
    vector = {name: value - torch.tensordot(share, axes[name], dims=1) for name, value in task.vector.items()}
    return replace(task, vector=vector)
