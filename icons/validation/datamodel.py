"""Does influence predict? The linear datamodelling score, its interval, and how scores sort out bad records.

Models are trained on random subsets of the data; a score that means something must predict their losses.
Source: Park et al. 2023 (TRAK, arXiv 2303.14186, section 4: linear datamodeling score).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats


def draw_subsets(num_rows: int, num_subsets: int, share: float, seed: int = 0) -> list[Int[np.ndarray, " chosen"]]:
    """Random subsets of `share` of the rows, each ascending; subset i is the same whatever `num_subsets` is.

    Raises:
        ValueError: the share leaves no row in, or none out.

    >>> [subset.tolist() for subset in draw_subsets(4, 2, 0.5)]
    [[0, 2], [0, 3]]
    """
    size = round(share * num_rows)
    if not 0 < size < num_rows:
        raise ValueError(
            f"share {share} of {num_rows} rows: gives subsets of {size} rows; expected some in and some out"
        )
    return [
        np.sort(np.random.default_rng([seed, number]).permutation(num_rows)[:size]) for number in range(num_subsets)
    ]


def predicted_gain(
    influence: Float[np.ndarray, "rows tasks"], subsets: Sequence[Int[np.ndarray, " chosen"]]
) -> Float[np.ndarray, "subsets tasks"]:
    """Sum of the scores of each subset's rows, per task; a row without a score (NaN) adds nothing. float64.

    >>> predicted_gain(np.array([[1.0], [2.0], [np.nan]]), [np.array([0, 2]), np.array([0, 1])]).tolist()
    [[1.0], [3.0]]
    """
    filled = np.nan_to_num(influence.astype(np.float64), nan=0.0)
    return np.stack([filled[subset].sum(axis=0) for subset in subsets])


def spearman(
    left: Float[np.ndarray, "*draws count tasks"], right: Float[np.ndarray, "*draws count tasks"]
) -> Float[np.ndarray, "*draws tasks"]:
    """Rank correlation of the columns, of several draws at once if there are; 0 where a column is constant.

    >>> spearman(np.array([[1.0], [2.0], [3.0]]), np.array([[10.0], [30.0], [20.0]])).tolist()
    [0.5]
    """
    a, b = (stats.rankdata(values, axis=-2) - (values.shape[-2] + 1) / 2 for values in (left, right))
    norm = np.sqrt((a**2).sum(axis=-2) * (b**2).sum(axis=-2))
    return np.divide((a * b).sum(axis=-2), norm, out=np.zeros(norm.shape), where=norm > 0)


def datamodelling_score(
    predicted: Float[np.ndarray, "subsets tasks"],
    losses: Float[np.ndarray, "measured losses"],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean over tasks of the rank correlation between predicted gain and minus the loss, with its 95 % interval.

    The interval is the percentile bootstrap over subsets: subsets are drawn with replacement, all tasks together.

    Returns:
        Estimate, lower end, upper end.

    Raises:
        ValueError: shapes differ, or there are fewer than 3 subsets.
    """
    if predicted.shape != losses.shape or len(losses) < 3:
        raise ValueError(
            f"datamodelling score: predictions {predicted.shape}, losses {losses.shape}; expected the same shape, and "
            "at least 3 subsets"
        )
    generator = np.random.default_rng(seed)
    estimate = spearman(predicted, -losses).mean()
    drawn = generator.integers(0, len(losses), (resamples, len(losses)))
    parts = np.array_split(drawn, max(1, drawn.size * losses.shape[1] >> 20))  # a few MB at a time
    means = np.concatenate([spearman(predicted[part], -losses[part]).mean(axis=-1) for part in parts])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(estimate), float(low), float(high)


def separation(score: Float[np.ndarray, " rows"], bad: Bool[np.ndarray, " rows"]) -> float:
    """Probability that a bad record scores below a good one (area under the curve; ties count half); 0.5 is chance.

    Rows without a score are left out; NaN if no bad or no good record is left.

    >>> separation(np.array([1.0, 2.0, 3.0]), np.array([True, False, False]))
    1.0
    """
    known = np.isfinite(score)
    score, bad = score[known], bad[known]
    if bad.all() or not bad.any():
        return float("nan")
    pairs_lost = stats.mannwhitneyu(score[bad], score[~bad]).statistic
    return float(1 - pairs_lost / (bad.sum() * (~bad).sum()))


def separation_interval(area: float, num_bad: int, num_good: int) -> tuple[float, float]:
    """95 % interval of `separation` over the draw of records, by the normal approximation; within 0 and 1.

    Source: Hanley and McNeil 1982, The meaning and use of the area under a receiver operating characteristic curve.

    >>> [round(end, 3) for end in separation_interval(0.9, 50, 100)]
    [0.84, 0.96]
    """
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (num_bad - 1) * (one - area**2) + (num_good - 1) * (two - area**2)
    half = 1.96 * float(np.sqrt(max(variance, 0) / (num_bad * num_good)))
    return max(0.0, area - half), min(1.0, area + half)


def share_in_lowest(score: Float[np.ndarray, " rows"], bad: Bool[np.ndarray, " rows"], share: float = 0.2) -> float:
    """How many of the bad records are among the lowest `share` of all scored rows (ties by row); by chance, `share`.

    NaN if no bad record has a score.

    >>> share_in_lowest(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([True, False, False, False, True]))
    0.5
    """
    known = np.flatnonzero(np.isfinite(score))
    lowest = known[np.argsort(score[known], kind="stable")][: max(1, round(share * len(known)))]
    return float(bad[lowest].sum() / bad[known].sum()) if bad[known].any() else float("nan")


def mean_interval(values: Float[np.ndarray, " seeds"]) -> list[float]:
    """Mean with its 95 % interval by Student's t; of a single value the ends are NaN.

    >>> [round(number, 2) for number in mean_interval(np.array([1.0, 2.0, 3.0]))]
    [2.0, -0.48, 4.48]
    """
    mean, freedom = float(values.mean()), len(values) - 1
    if freedom == 0:
        return [mean, float("nan"), float("nan")]
    half = float(stats.t.ppf(0.975, freedom)) * float(values.std(ddof=1)) / float(np.sqrt(len(values)))
    return [mean, mean - half, mean + half]
