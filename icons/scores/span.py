"""The span of a task's validation gradients, and cosines within it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The leading directions of a task's validation rows, and the rows within them.

    Attributes:
        basis: `[r, K]` orthonormal, the strongest direction first.
        rows: `[M, r]` validation rows within the span, of length 1; NaN for a failed row.
        mean: `[r]` the mean of the usable ones.
    """

    basis: Float[Tensor, "directions dim"]
    rows: Float[Tensor, "validation directions"]
    mean: Float[Tensor, " directions"]

    def cosines(self, gradient: Float[Tensor, "block dim"]) -> Float[Tensor, "block directions"]:
        """Training rows within the span, of length 1; zeros for a row at right angles to it. Their products with `rows`
        are cosines within the span."""
        return torch.nn.functional.normalize(gradient @ self.basis.T, dim=1)


def span_of(rows: Float[Tensor, "validation dim"], share: float) -> Span:
    """The fewest directions that hold `share` of the rows' squared length.

    With a share of 1 it is all of their span.

    Args:
        rows: normalised validation rows; NaN for failed ones.
        share: above 0 and at most 1.

    Raises:
        ValueError: another share, or rows that are all zeros.

    Source: arXiv 2602.18584 (GIST): for low-rank updates, gradients within the validation gradients' leading singular
    directions.

    >>> rows = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0]])
    >>> span_of(rows, 0.9).basis.shape, span_of(rows, 1.0).basis.shape
    (torch.Size([1, 3]), torch.Size([2, 3]))
    """
    usable = rows.isfinite().all(dim=1)
    basis = (span_coefficients(rows, share)[usable].T @ rows[usable].double()).float()
    coordinates = rows @ basis.T
    return Span(basis, torch.nn.functional.normalize(coordinates, dim=1), mean_within(coordinates))


def mean_within(coordinates: Float[Tensor, "validation directions"]) -> Float[Tensor, " directions"]:
    """The mean of the rows that did not fail (NaN), each made of length 1 within the span."""
    inside = torch.nn.functional.normalize(coordinates, dim=1)
    return inside[inside.isfinite().all(dim=1)].mean(dim=0)


def span_coefficients(rows: Float[Tensor, "validation dim"], share: float) -> Float[Tensor, "validation directions"]:
    """The span's directions as sums of the rows, float64; zeros for failed rows; see `span_of`."""
    if not 0 < share <= 1:
        raise ValueError(f"subspace: got {share}; expected a share above 0 and at most 1")
    good = rows.isfinite().all(dim=1)
    usable = rows[good].double()
    values, vectors = torch.linalg.eigh(usable @ usable.T)  # as many as there are rows, fewer than dimensions
    strength = values.flip(0).clamp(min=0)
    if not strength[0] > 0:
        raise ValueError("subspace: the task's validation gradients are all zeros; expected at least one that is not")
    rank = int((strength > strength[0] * 1e-10).sum())
    held = strength.cumsum(0) / strength.sum()
    count = min(rank, int((held < share - 1e-9).sum()) + 1)
    coefficients = torch.zeros(len(rows), count, dtype=torch.float64, device=rows.device)
    coefficients[good] = vectors.flip(1)[:, :count] / strength[:count].sqrt()
    return coefficients
