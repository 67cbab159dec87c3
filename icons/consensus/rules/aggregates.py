"""Rules that turn a row's scores on all tasks into one number.

Source: arXiv 2501.00654, section 3 (vote) and its comparison of aggregations (mean, max, rank, norm).
"""

import numpy as np
from jaxtyping import Float, Int, Shaped

from icons.consensus.ranking import midranks
from icons.consensus.rules.evidence import Evidence


def vote(evidence: Evidence) -> Shaped[np.ndarray, " scored"]:
    """How many tasks' thresholds the row reaches (`>=`), each vote times its task's weight."""
    weights, thresholds = evidence.weights, evidence.thresholds
    if (weights == 1).all():
        return evidence.votes
    return evidence.columns.total(lambda column, task: (column >= thresholds[task]).astype(np.float64), weights)


def mean(evidence: Evidence) -> Float[np.ndarray, " scored"]:
    """Weighted mean of the scores."""
    return _weighted_mean(evidence, evidence.weights)


def _weighted_mean(evidence: Evidence, weights: Float[np.ndarray, " tasks"]) -> Float[np.ndarray, " scored"]:
    return evidence.columns.total(lambda column, task: column.astype(np.float64), weights) / weights.sum()


def maximum(evidence: Evidence) -> Float[np.ndarray, " scored"]:
    """The highest of the weighted scores."""
    columns = evidence.columns
    highest = np.full(columns.num_scored, -np.inf)
    for task in range(columns.num_tasks):
        np.maximum(highest, columns.column(task) * evidence.weights[task], out=highest)
    return highest


def rank(evidence: Evidence) -> Float[np.ndarray, " scored"]:
    """Mean percentile rank: the share of rows with a lower score, plus half of those with an equal one."""
    return evidence.tie


def norm(evidence: Evidence) -> Float[np.ndarray, " scored"]:
    """Weighted mean of the standardised scores (each task's to mean 0 and variance 1); a constant task counts 0."""
    weights = evidence.weights
    return evidence.columns.total(lambda column, task: standardised(column), weights) / weights.sum()


def standardised(column: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """To mean 0 and variance 1, float64; zeros if all values are the same.

    >>> standardised(np.array([1.0, 3.0])).tolist()
    [-1.0, 1.0]
    """
    values = column.astype(np.float64)
    values -= values.mean()
    spread = values.std()
    return values / spread if spread > 0 else np.zeros_like(values)


def borda(evidence: Evidence) -> Shaped[np.ndarray, " scored"]:
    """Borda count among those a task votes for: its border row gets the fewest points, its best row the most, and a row
    below the threshold none. (A Borda count over all rows is `rank`.) Doubled, to be integers."""

    def points(column: Float[np.ndarray, " rows"], task: int) -> Int[np.ndarray, " rows"]:
        doubled = midranks(column)
        voted = column >= evidence.thresholds[task]
        return np.where(voted, doubled - (doubled[voted].min() - 2), 0)

    return evidence.columns.total(points, None if (evidence.weights == 1).all() else evidence.weights)


def direct_merge(evidence: Evidence) -> Float[np.ndarray, " scored"]:
    """The mean over one pool of all tasks' validation rows, which is the mean of the tasks' means, weighted by their
    validation rows.

    Raises:
        ValueError: their numbers are not known.
    """
    return _weighted_mean(evidence, merge_weights(evidence))


def merge_weights(evidence: Evidence) -> Float[np.ndarray, " tasks"]:
    """Validation rows per task."""
    counts, num_tasks = evidence.num_validation, evidence.columns.num_tasks
    if counts is None:
        counts = getattr(evidence.scores, "manifest", {}).get("num_validation")
    if counts is None or len(counts) != num_tasks:
        raise ValueError(
            f"direct_merge: got num_validation={counts}; expected the validation rows of {num_tasks} tasks"
        )
    return np.asarray(counts, np.float64)
