"""From scores per task to one number per row: the vote, the paper's other aggregations, and two more.

Every function takes the scores of the rows that have one, column by column, the tasks' thresholds and weights, and
returns a number per row; higher is better. Source: arXiv 2501.00654, section 3 (vote) and its comparison of
aggregations (mean, max, rank, norm).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int, Shaped

from icons.consensus.ranking import midranks, order_of

T = TypeVar("T")
BLOCK_ROWS = 1 << 16
NUM_THREADS = 2
"""Columns worked on at once: each needs about 200 bytes per row, and numpy sorts without holding the interpreter."""


class Columns:
    """Scores of the rows that have one, task by task, without a second copy of the matrix.

    Args:
        scores: `[N, S]`; NaN in any task means the row has no score.
        tasks: names of the S tasks, for messages.

    Raises:
        ValueError: no task, or no row has a score.
    """

    def __init__(self, scores: Float[np.ndarray, "rows tasks"], tasks: Sequence[str]) -> None:
        self.scores, self.tasks = scores, list(tasks)
        self.num_rows, self.num_tasks = scores.shape
        if self.num_tasks == 0:
            raise ValueError(f"scores: got shape {scores.shape}; expected at least one task")
        blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, self.num_rows, BLOCK_ROWS)]
        finite = [np.isfinite(scores[block]).all(axis=1) for block in blocks]
        self.scored = np.concatenate([np.empty(0, bool), *finite])
        self.num_scored = int(self.scored.sum())
        if self.num_scored == 0:
            raise ValueError(f"scores: none of the {self.num_rows} rows has a finite score for every task")

    def column(self, task: int) -> Float[np.ndarray, " scored"]:
        column = self.scores[:, task]
        return np.ascontiguousarray(column if self.num_scored == self.num_rows else column[self.scored])

    def each(self, work: Callable[[Float[np.ndarray, " scored"]], T]) -> list[T]:
        """`work` on every column, two at a time; results in the order of the tasks."""
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return list(pool.map(lambda task: work(self.column(task)), range(self.num_tasks)))

    def total(
        self,
        work: Callable[[Float[np.ndarray, " scored"], int], Shaped[np.ndarray, " scored"]],
        weights: Float[np.ndarray, " tasks"] | None = None,
    ) -> Shaped[np.ndarray, " scored"]:
        """Sum over tasks of `work(column, task)`, each times its weight; added in the order of the tasks."""

        def weighted(column: Float[np.ndarray, " scored"], task: int) -> tuple[Shaped[np.ndarray, " scored"]]:
            part = work(column, task)
            return (part if weights is None else part * weights[task],)

        return self.totals(weighted)[0]

    def totals(
        self, work: Callable[[Float[np.ndarray, " scored"], int], tuple[Shaped[np.ndarray, " scored"], ...]]
    ) -> list[Shaped[np.ndarray, " scored"]]:
        """Sums over tasks of each thing that `work(column, task)` gives: several for one reading of a column."""
        sums: list[np.ndarray] = []
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for first in range(0, self.num_tasks, NUM_THREADS):
                some = range(first, min(first + NUM_THREADS, self.num_tasks))
                for parts in pool.map(lambda task: work(self.column(task), task), some):
                    if sums:
                        for whole, part in zip(sums, parts, strict=True):
                            np.add(whole, part, out=whole)
                    else:
                        sums = [part.copy() for part in parts]
        return sums


def threshold(column: Float[np.ndarray, " rows"], fraction: float) -> np.floating:
    """The (100 - p)-th percentile of a task's scores, p = 100 `fraction`, with numpy's linear interpolation.

    In the dtype of the scores, as in the original, so that `column >= threshold` gives the same votes.

    >>> float(threshold(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 0.25))
    4.0
    """
    return np.percentile(column, percentile(fraction), overwrite_input=False)


def percentile(fraction: float) -> float:
    """100 - p for a share p, free of the dust of binary fractions: 93.0 for 0.07."""
    return round(100 - 100 * fraction, 9)


def vote(
    columns: Columns, thresholds: Float[np.ndarray, " tasks"], weights: Float[np.ndarray, " tasks"]
) -> Shaped[np.ndarray, " rows"]:
    """How many tasks' thresholds the row reaches (`>=`), each vote times its task's weight."""
    if (weights == 1).all():
        return columns.total(lambda column, task: (column >= thresholds[task]).astype(np.int32))
    return columns.total(lambda column, task: (column >= thresholds[task]).astype(np.float64), weights)


def mean(
    columns: Columns, thresholds: Float[np.ndarray, " tasks"], weights: Float[np.ndarray, " tasks"]
) -> Float[np.ndarray, " rows"]:
    """Weighted mean of the scores."""
    return columns.total(lambda column, task: column.astype(np.float64), weights) / weights.sum()


def maximum(
    columns: Columns, thresholds: Float[np.ndarray, " tasks"], weights: Float[np.ndarray, " tasks"]
) -> Float[np.ndarray, " rows"]:
    """The highest of the weighted scores."""
    highest = np.full(columns.num_scored, -np.inf)
    for task in range(columns.num_tasks):
        np.maximum(highest, columns.column(task) * weights[task], out=highest)
    return highest


def rank(
    columns: Columns, thresholds: Float[np.ndarray, " tasks"], weights: Float[np.ndarray, " tasks"]
) -> Shaped[np.ndarray, " rows"]:
    """Mean percentile rank: the share of rows with a lower score, plus half of those with an equal one."""
    return percentile_ranks(columns, weights)


def norm(
    columns: Columns, thresholds: Float[np.ndarray, " tasks"], weights: Float[np.ndarray, " tasks"]
) -> Float[np.ndarray, " rows"]:
    """Weighted mean of the standardised scores (each task's to mean 0 and variance 1); a constant task counts 0."""
    return columns.total(lambda column, task: standardised(column), weights) / weights.sum()


def standardised(column: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    values = column.astype(np.float64)
    values -= values.mean()
    spread = values.std()
    return values / spread if spread > 0 else np.zeros_like(values)


def borda(
    columns: Columns, thresholds: Float[np.ndarray, " tasks"], weights: Float[np.ndarray, " tasks"]
) -> Shaped[np.ndarray, " rows"]:
    """Borda count among those a task votes for: its border row gets the fewest points, its best row the most, and a row
    below the threshold none. (A Borda count over all rows is `rank`.) Doubled, to be integers."""

    def points(column: Float[np.ndarray, " rows"], task: int) -> Int[np.ndarray, " rows"]:
        doubled = midranks(column)
        voted = column >= thresholds[task]
        return np.where(voted, doubled - (doubled[voted].min() - 2), 0)

    return columns.total(points, None if (weights == 1).all() else weights)


def round_robin(
    columns: Columns, thresholds: Float[np.ndarray, " tasks"], weights: Float[np.ndarray, " tasks"]
) -> Int[np.ndarray, " rows"]:
    """Each task in turn takes its best row that is not yet taken; minus the turn in which a row is taken.

    A task of weight w takes w rows per turn, as near as whole rows allow.
    """
    orders = columns.each(lambda column: order_of(-column).astype(np.int32))
    taken_at = np.full(columns.num_scored, -1, np.int64)
    position, credit = [0] * columns.num_tasks, np.zeros(columns.num_tasks)
    turn, share = 0, weights / weights.max()
    while turn < columns.num_scored:
        credit += share
        for task in np.flatnonzero(credit >= 1 - 1e-9).tolist():
            credit[task] -= 1
            order, at = orders[task], position[task]
            while at < len(order) and taken_at[order[at]] >= 0:
                at += 1
            position[task] = at
            if at < len(order):
                taken_at[order[at]] = turn
                turn += 1
    return -taken_at


METHODS: dict[
    str, Callable[[Columns, Float[np.ndarray, " tasks"], Float[np.ndarray, " tasks"]], Shaped[np.ndarray, " rows"]]
] = {
    "vote": vote,
    "mean": mean,
    "max": maximum,
    "rank": rank,
    "norm": norm,
    "borda": borda,
    "round_robin": round_robin,
}


def percentile_ranks(columns: Columns, weights: Float[np.ndarray, " tasks"]) -> Float[np.ndarray, " rows"]:
    """Weighted mean over tasks of the percentile rank, in (0, 1). Equal weights: exact sums, so that ties stay ties."""
    factors = rank_factors(weights)
    doubled = columns.total(lambda column, task: midranks(column) * factors[task])
    return shares_of_ranks(doubled, factors, columns.num_scored)


def rank_factors(weights: Float[np.ndarray, " tasks"]) -> Shaped[np.ndarray, " tasks"]:
    """What midranks are multiplied by: integer ones for equal weights, so that sums are exact."""
    return np.ones(len(weights), np.int64) if (weights == weights[0]).all() else weights


def shares_of_ranks(
    doubled: Shaped[np.ndarray, " rows"], factors: Shaped[np.ndarray, " tasks"], num_rows: int
) -> Float[np.ndarray, " rows"]:
    """Sums of doubled midranks as mean percentile ranks."""
    total = factors.sum()
    return (doubled - total) / (2 * num_rows * total)


def survey(
    columns: Columns, fraction: float, weights: Float[np.ndarray, " tasks"]
) -> tuple[Float[np.ndarray, " tasks"], Int[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """What every selection needs, reading each column once: thresholds, votes, and mean percentile ranks."""
    thresholds = np.empty(columns.num_tasks, columns.scores.dtype)
    factors = rank_factors(weights)

    def work(column: Float[np.ndarray, " rows"], task: int) -> tuple[Shaped[np.ndarray, " rows"], ...]:
        thresholds[task] = threshold(column, fraction)
        ranks = midranks(column)
        ranks = ranks if factors.dtype == np.int64 else ranks * factors[task]
        return (column >= thresholds[task]).astype(np.int32), ranks

    votes, doubled = columns.totals(work)
    return thresholds, votes, shares_of_ranks(doubled, factors, columns.num_scored)
