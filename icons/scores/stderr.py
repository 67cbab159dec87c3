"""The standard error that a random projection leaves in an influence score, in closed form, at no extra pass.

A projection to K numbers with independent columns makes every inner product a mean of K products, and every cosine a
function of three such means. With x the projected training row and w the average projected validation row,

    K Var(x.w) = |x|^2 |w|^2 + (x.w)^2

for exact norms (for a single pair of unit vectors sqrt((1 + cos^2) / K)). Dividing by the projected norm instead takes
some of the error away, since norm and product err together; the delta method gives, with T the score and R the mean
squared cosine between the task's validation rows,

    - 3/2 T^2                            training row divided by its projected norm
    + 1/2 T^2 R - 2 T^2 |w|^2            validation rows divided by theirs
    + T^4                                both

(for a single pair (1 - cos^2)^2, as for a sample correlation). The terms of the validation side take every validation
row's own cosine with x to be T; they matter only where T is large.
"""

from jaxtyping import Float
from torch import Tensor


def standard_error(
    influence: Float[Tensor, "rows tasks"],
    train_square: Float[Tensor, " rows"],
    task_square: Float[Tensor, " tasks"],
    overlap: Float[Tensor, " tasks"],
    dim: int,
    train_projected: bool = True,
    task_projected: bool = True,
) -> Float[Tensor, "rows tasks"]:
    """Standard error of `influence` for a random projection to `dim` numbers.

    Args:
        influence: the scores T.
        train_square: squared norm of each training row as it enters the product (1 when normalised).
        task_square: squared norm of each task's average validation vector.
        overlap: mean squared cosine over all pairs of a task's validation rows, each with itself included.
        dim: K.
        train_projected: training rows are divided by their projected norm.
        task_projected: validation rows are divided by theirs.

    Source: Gaussian moments and the delta method; for one pair, Fisher's variance of a correlation. Rademacher and
    count-sketch projections have these moments up to a term that vanishes for gradients spread over many parameters.

    >>> import torch
    >>> one = torch.ones(1)
    >>> standard_error(torch.tensor([[0.6]]), one, one, one, dim=100)
    tensor([[0.0640]])
    """
    square = influence**2
    variance = train_square[:, None] * task_square + square
    if train_projected:
        variance = variance - 1.5 * square
    if task_projected:
        variance = variance + square * (0.5 * overlap - 2 * task_square)
    if train_projected and task_projected:
        variance = variance + square**2
    return (variance.clamp(min=0) / dim).sqrt()


def covariance(
    left_right: Float[Tensor, " rows"],
    task_left_right: Float[Tensor, " tasks"],
    left_task: Float[Tensor, "rows tasks"],
    right_task: Float[Tensor, "rows tasks"],
    dim: int,
) -> Float[Tensor, "rows tasks"]:
    """Covariance of the scores of two checkpoints whose gradients went through the same projection, to leading order.

    Args:
        left_right: product of the row's two vectors.
        task_left_right: product of the task's two average vectors.
        left_task: the row at the first checkpoint times the task's vector at the second.
        right_task: the row at the second checkpoint times the task's vector at the first.
        dim: K.
    """
    return (left_right[:, None] * task_left_right + left_task * right_task) / dim


def mean_squared_cosine(rows: Float[Tensor, "rows dim"]) -> float:
    """Mean over all pairs of unit rows, each with itself included, of their squared cosine.

    >>> import torch
    >>> mean_squared_cosine(torch.eye(4))
    0.25
    """
    return float((rows @ rows.T).square().mean())
