"""Scores of the rows that have one, task by task: thresholds, votes and percentile ranks in one reading of each."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from icons.consensus.ranking import midranks

T = TypeVar("T")
_BLOCK_ROWS = 1 << 16
_NUM_THREADS = 2
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
        blocks = [slice(start, start + _BLOCK_ROWS) for start in range(0, self.num_rows, _BLOCK_ROWS)]
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
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
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
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for first in range(0, self.num_tasks, _NUM_THREADS):
                some = range(first, min(first + _NUM_THREADS, self.num_tasks))
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


def voted(
    scores: Float[np.ndarray, "rows tasks"], thresholds: Float[np.ndarray, " tasks"]
) -> Bool[np.ndarray, "rows tasks"]:
    """Which tasks vote for which rows: those whose threshold a row reaches. A row without a score has no vote.

    >>> voted(np.array([[0.3, 0.1], [0.2, 0.5], [0.9, np.nan]]), np.array([0.2, 0.4])).sum(axis=1).tolist()
    [1, 2, 0]
    """
    return (scores >= thresholds) & np.isfinite(scores).all(axis=1, keepdims=True)


def percentile(fraction: float) -> float:
    """100 - p for a share p, free of the dust of binary fractions: 93.0 for 0.07."""
    return round(100 - 100 * fraction, 9)


def _rank_factors(weights: Float[np.ndarray, " tasks"]) -> Shaped[np.ndarray, " tasks"]:
    """What midranks are multiplied by: integer ones for equal weights, so that sums are exact."""
    return np.ones(len(weights), np.int64) if (weights == weights[0]).all() else weights


def _shares_of_ranks(
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
    factors = _rank_factors(weights)

    def work(column: Float[np.ndarray, " rows"], task: int) -> tuple[Shaped[np.ndarray, " rows"], ...]:
        thresholds[task] = threshold(column, fraction)
        ranks = midranks(column)
        ranks = ranks if factors.dtype == np.int64 else ranks * factors[task]
        return (column >= thresholds[task]).astype(np.int32), ranks

    votes, doubled = columns.totals(work)
    return thresholds, votes, _shares_of_ranks(doubled, factors, columns.num_scored)
