"""torchmetrics twins of the consensus functions: the same numbers, summed over batches and over processes."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric


class _Votes(Metric):
    """Counts votes, for given thresholds."""

    full_state_update = False
    thresholds: Tensor

    def __init__(self, thresholds: Sequence[float] | Float[Tensor, " tasks"]) -> None:
        super().__init__()
        self.register_buffer("thresholds", torch.as_tensor(thresholds, dtype=torch.float32))

    def voted(self, influence: Float[Tensor, "batch tasks"]) -> Bool[Tensor, "scored tasks"]:
        scored = influence.isfinite().all(dim=1)
        return influence[scored] >= self.thresholds


class ConsensusVotes(_Votes):
    """How many rows have 0, 1, ... S votes, for given thresholds.

    Twin of `icons.consensus.select(...).votes`, counted. A row with NaN for any task has no score and is not counted.

    Args:
        thresholds: one per task; a task votes for a row whose score is `>=` its threshold.

    >>> metric = ConsensusVotes([0.5, 0.5])
    >>> metric.update(torch.tensor([[0.9, 0.1], [0.5, 0.6], [0.1, 0.1]]))
    >>> metric.compute().tolist()
    [1, 1, 1]
    """

    counts: Tensor

    def __init__(self, thresholds: Sequence[float] | Float[Tensor, " tasks"]) -> None:
        super().__init__(thresholds)
        zeros = torch.zeros(len(thresholds) + 1, dtype=torch.int64)
        self.add_state("counts", default=zeros, dist_reduce_fx="sum")

    def update(self, influence: Float[Tensor, "batch tasks"]) -> None:
        votes = self.voted(influence).sum(dim=1)
        self.counts += torch.bincount(votes, minlength=len(self.counts))

    def compute(self) -> Int[Tensor, " counts"]:
        return self.counts


class TaskOverlap(_Votes):
    """Of the rows that a task votes for (row of the matrix), the share that another votes for too (column).

    Twin of `icons.consensus.overlap.task_overlap`, for given thresholds. A task that votes for no row has 0 everywhere.

    Args:
        thresholds: one per task; a task votes for a row whose score is `>=` its threshold.

    >>> metric = TaskOverlap([0.5, 0.5])
    >>> metric.update(torch.tensor([[0.9, 0.1], [0.5, 0.6], [0.1, 0.1]]))
    >>> metric.compute().tolist()
    [[1.0, 0.5], [1.0, 1.0]]
    """

    shared: Tensor

    def __init__(self, thresholds: Sequence[float] | Float[Tensor, " tasks"]) -> None:
        super().__init__(thresholds)
        zeros = torch.zeros(len(thresholds), len(thresholds), dtype=torch.float64)
        self.add_state("shared", default=zeros, dist_reduce_fx="sum")

    def update(self, influence: Float[Tensor, "batch tasks"]) -> None:
        votes = self.voted(influence).double()
        self.shared += votes.T @ votes

    def compute(self) -> Float[Tensor, "tasks tasks"]:
        return self.shared / self.shared.diagonal().clamp(min=1)[:, None]


class RelativePerformance(Metric):
    """Rel. (%): the mean over tasks of 100 x accuracy / reference accuracy, as in the paper's tables.

    The mean is over tasks, so that a small task counts as much as a large one. A task without a sample is left out.

    Args:
        reference: each task's accuracy after training on all of the data, above 0.

    Raises:
        ValueError: a reference that is not above 0.

    >>> metric = RelativePerformance([0.5, 1.0])
    >>> metric.update(torch.tensor([True, False, True]), torch.tensor([0, 0, 1]))
    >>> metric.compute()
    tensor(100.)
    """

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    total: Tensor
    reference: Tensor

    def __init__(self, reference: Sequence[float] | Float[Tensor, " tasks"]) -> None:
        super().__init__()
        self.register_buffer("reference", torch.as_tensor(reference, dtype=torch.float32))
        if not (self.reference > 0).all():
            raise ValueError(f"relative performance: got reference {self.reference.tolist()}; expected numbers above 0")
        zeros = torch.zeros(len(reference), dtype=torch.int64)
        self.add_state("correct", default=zeros, dist_reduce_fx="sum")
        self.add_state("total", default=zeros.clone(), dist_reduce_fx="sum")

    def update(self, correct: Bool[Tensor, " batch"], task: Int[Tensor, " batch"]) -> None:
        """Counts samples: whether each was answered right, and which task it belongs to."""
        self.correct += torch.bincount(task[correct], minlength=len(self.correct))
        self.total += torch.bincount(task, minlength=len(self.total))

    def compute(self) -> Float[Tensor, ""]:
        accuracy = self.correct / self.total
        return 100 * (accuracy / self.reference)[self.total > 0].mean()
