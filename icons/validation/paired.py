"""Paired differences between rules: the mean over pools or seeds, its interval, and what stays significant of many.

Two rules are compared on the same pools with the same seeds. What counts as one observation is the pool where there are
several (the seeds of a pool share its warm-up, its scores and its tests: their mean is taken first), else the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """How much better one rule is than another.

    Attributes:
        mean: of the paired differences.
        low, high: its 95 % interval by Student's t; NaN for a single pair.
        p_value: two-sided, of the paired t-test; NaN for a single pair.
        num_pairs: pools, or seeds of a single pool.
        adjusted: the p-value corrected for the number of comparisons, see `corrected`; NaN until then.
    """

    mean: float
    low: float
    high: float
    p_value: float
    num_pairs: int
    adjusted: float = float("nan")

    @property
    def is_significant(self) -> bool:
        """At 5 %, after correction."""
        return self.adjusted < 0.05


def paired_difference(ours: Float[np.ndarray, "pools seeds"], theirs: Float[np.ndarray, "pools seeds"]) -> Difference:
    """`ours` minus `theirs`, pool by pool or, of a single pool, seed by seed. float64.

    Differences that are all the same leave no doubt about their mean: the interval is that number, and the p-value 1
    if it is 0, else 0.

    Raises:
        ValueError: there is no value, or one is not finite.

    >>> paired_difference(np.array([[3.0, 4.0]]), np.array([[1.0, 2.0]]))
    Difference(mean=2.0, low=2.0, high=2.0, p_value=0.0, num_pairs=2, adjusted=nan)
    """
    assert ours.shape == theirs.shape, "rules are compared on the same pools and seeds"
    if not ours.size:
        raise ValueError(f"paired difference: got {ours.shape} pools and seeds; expected at least one of each")
    values = ours.astype(np.float64) - theirs.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("paired difference: got a value that is not finite; expected one number per pool and seed")
    pairs = values.mean(axis=1) if len(values) > 1 else values[0]
    mean, freedom = float(pairs.mean()), len(pairs) - 1
    if freedom == 0:
        return Difference(mean, float("nan"), float("nan"), float("nan"), 1)
    error = float(pairs.std(ddof=1) / np.sqrt(len(pairs)))
    if error == 0:
        return Difference(mean, mean, mean, float(mean == 0), len(pairs))
    half = float(stats.t.ppf(0.975, freedom)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return Difference(mean, mean - half, mean + half, p_value, len(pairs))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: reject those below 0.05, and the chance of any false one is at most 5 %.

    The i-th smallest of m is multiplied by m - i (i from 0), made no smaller than the one before it, and at most 1. NaN
    stays NaN and is not counted.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, np.float64)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    adjusted = np.full(len(values), np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)))
    return adjusted.tolist()


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The same differences, each with its p-value adjusted for the number of them (Holm)."""
    adjusted = holm([difference.p_value for difference in differences])
    return [replace(difference, adjusted=p) for difference, p in zip(differences, adjusted, strict=True)]
