"""The axes along which validation rows differ most, and vectors without them.

Rows that ask for opposite answers ("yes" and "no") have nearly opposite gradients, right or wrong: the leading axes
tell which answer is asked for, not whether a training row teaches it well. How far a task's average lies along them is
decided by how many rows of each answer its validation file happens to hold, and it shifts the score of every training
row with one of these answers. Without the axes, the scores no longer know of it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def leading_axes(samples: Sequence[Float[Tensor, "_ dim"]], count: int) -> Float[Tensor, "count dim"]:
    """The `count` leading principal axes of the tasks' rows, each task's about its own mean; tasks weigh equally.

    Orthonormal, float32, the strongest first; each one's sign is arbitrary.

    Args:
        samples: each task's validation rows, or a sample of them.
        count: axes wanted.

    Raises:
        ValueError: the rows do not vary along so many axes.

    >>> rows = torch.tensor([[3.0, 0.0, 1.0], [-3.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, -1.0, 1.0]])
    >>> leading_axes([rows], 1).abs().tolist()
    [[1.0, 0.0, 0.0]]
    """
    parts = zip(axis_coefficients(samples, count), samples, strict=True)
    return torch.stack([of_task.T @ rows.double() for of_task, rows in parts]).sum(dim=0).float()


def axis_coefficients(samples: Sequence[Float[Tensor, "_ dim"]], count: int) -> list[Float[Tensor, "_ count"]]:
    """The leading axes as sums of the rows: one coefficient for each row and axis, float64; see `leading_axes`."""
    centred = torch.cat([(rows - rows.mean(dim=0)) / max(len(rows), 1) ** 0.5 for rows in samples]).double()
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # as many as there are rows, fewer than dimensions
    strength = values.flip(0)
    rank = int((strength > strength[0].clamp(min=1e-30) * 1e-10).sum())
    if count > rank:
        raise ValueError(
            f"drop axes: got {count}; the tasks' validation rows vary along {rank} axes only: expected fewer than these"
        )
    of_centred = (vectors.flip(1)[:, :count] / strength[:count].sqrt()).split([len(rows) for rows in samples])
    return [(part - part.mean(dim=0)) / max(len(part), 1) ** 0.5 for part in of_centred]


def without(rows: Float[Tensor, "_ dim"], axes: Float[Tensor, "count dim"]) -> Float[Tensor, "_ dim"]:
    """The rows' parts that are at right angles to all axes; NaN stays in its row.

    >>> without(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])).tolist()
    [[0.0, 4.0]]
    """
    return rows - (rows @ axes.T) @ axes
