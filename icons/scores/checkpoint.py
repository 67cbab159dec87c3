"""Checkpoint: what one checkpoint of the warm-up has of training rows and tasks, their products and how sure these are.

Scores of several checkpoints are weighted sums; what goes through the same projection errs together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from icons.scores.rows import Block, StoredRows
from icons.scores.stderr import covariance, standard_error
from icons.scores.task_means import TaskVectors


@dataclass(frozen=True)
class Checkpoint:
    """Training rows and task vectors of one checkpoint of the warm-up, and its weight."""

    train: StoredRows
    tasks: TaskVectors
    weight: float

    def product(self, block: Block, factor: Float[Tensor, " block"]) -> Float[Tensor, "block vectors"]:
        """Each row's product with each task vector, times the row's factor."""
        if self.tasks.spans:  # cosines, which no factor changes, but that of a failed row is 0
            inside = [span.cosines(block.gradient) @ span.mean for span in self.tasks.spans]
            return torch.stack(inside, dim=1)
        # this way round, the skinny product is twice as fast on a CPU
        return (self.tasks.mean @ block.gradient.T).T * factor[:, None]


def variance(
    checkpoints: Sequence[Checkpoint],
    several: Sequence[Block],
    factors: Sequence[Tensor],
    parts: Sequence[Tensor],
    projected: tuple[bool, bool],
) -> Float[Tensor, "block vectors"]:
    """Variance of the weighted sum of the checkpoints' scores; NaN within subspaces, where it is not known.

    Args:
        checkpoints: those that are summed.
        several: the block of rows as each of them has it.
        factors: of the rows, at each.
        parts: the products, at each.
        projected: whether training rows, and validation rows, are divided by their projected norm.
    """
    if any(checkpoint.tasks.spans and not checkpoint.tasks.exact for checkpoint in checkpoints):
        return torch.full_like(parts[0], torch.nan)
    total = torch.zeros_like(parts[0])
    for checkpoint, block, factor, part in zip(checkpoints, several, factors, parts, strict=True):
        if not checkpoint.tasks.exact:
            square, overlap = checkpoint.tasks.square, checkpoint.tasks.overlap
            lengths = (block.length * factor).square()
            error = standard_error(part, lengths, square, overlap, block.gradient.shape[1], *projected)
            total += checkpoint.weight**2 * error.square()
    for left, right in combinations(zip(checkpoints, several, factors, strict=True), 2):
        total += 2 * _cross(*left, *right)
    return total


def _cross(
    a: Checkpoint, one: Block, one_factor: Tensor, b: Checkpoint, other: Block, other_factor: Tensor
) -> Float[Tensor, "block vectors"] | float:
    """Covariance of two checkpoints' weighted scores; none if their projections differ."""
    if a.tasks.exact or b.tasks.exact or a.train.manifest.get("projector") != b.train.manifest.get("projector"):
        return 0.0
    rows = (one.gradient * other.gradient).sum(dim=1) * one_factor * other_factor
    vectors = (a.tasks.mean * b.tasks.mean).sum(dim=1)
    crossed = b.product(one, one_factor), a.product(other, other_factor)
    return a.weight * b.weight * covariance(rows, vectors, *crossed, one.gradient.shape[1])
