"""Plain rules that others have to beat: chance, the loss, the gradient's norm, chance among the better half."""

import numpy as np
from jaxtyping import Float, Int, Shaped

from icons.consensus.rules.aggregates import mean
from icons.consensus.rules.evidence import Evidence


def random(evidence: Evidence) -> Int[np.ndarray, " scored"]:
    """Rows drawn with the seed."""
    columns = evidence.columns
    return np.random.default_rng(evidence.seed).permutation(columns.num_rows)[columns.scored]


def loss(evidence: Evidence) -> Float[np.ndarray, " scored"]:
    """Highest loss first."""
    return evidence.column_of("loss")


def grad_norm(evidence: Evidence) -> Float[np.ndarray, " scored"]:
    """Highest gradient norm (before projection) first."""
    return evidence.column_of("norm")


def filtered_random(evidence: Evidence, *, better: float = 0.5) -> Shaped[np.ndarray, " scored"]:
    """Rows drawn with the seed from the better half of the scored rows by mean score over tasks.

    A row's draw depends on the seed and its place among the scored rows. Should more be wanted than that half, the
    best of the others follow.

    Args:
        evidence: scores and seed.
        better: share of the scored rows that is drawn from.

    Raises:
        ValueError: a share that is not above 0 and at most 1.
    """
    inside = evidence.better(better)[evidence.columns.scored]
    scores = mean(evidence)
    lowered = scores - scores.max() - 1  # all below 0, in their order
    lowered[inside] = np.random.default_rng(evidence.seed).random(len(scores))[inside]
    return lowered
