"""What the page shows of a score store, counted in one pass over blocks of rows: memory does not grow with the pool."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from icons.batch import Status
from icons.consensus.border import CERTAIN
from icons.consensus.rules import voted
from icons.store import ScoreStore

BLOCK_ROWS = 1 << 18
_SAMPLE_ROWS = 50_000
"""Rows that the distributions and the border are drawn from; every count is of all rows."""


@dataclass(frozen=True)
class ScoreNumbers:
    """Counts and samples of a score store, for tasks with given thresholds and a given selection."""

    tasks: Sequence[str]
    thresholds: Float[np.ndarray, " tasks"]
    status: dict[str, int]
    """Rows by status name; only those that occur."""
    votes: Int[np.ndarray, " counts"]
    """Scored rows with 0, 1, ... S votes."""
    votes_selected: Int[np.ndarray, " counts"]
    """The selected among them."""
    row_votes: UInt8[np.ndarray, " rows"]
    """uint8 votes of every row; 0 for failed rows."""
    shared: Int[np.ndarray, "tasks tasks"]
    """Rows that both tasks vote for; on the diagonal, the rows that one votes for."""
    kept: Int[np.ndarray, " tasks"]
    """Rows that the task votes for and that are selected."""
    certain: Int[np.ndarray, " tasks"]
    """Rows that the task votes for and whose 95 % interval lies above the threshold."""
    sample: Int[np.ndarray, " sample"]
    """A seeded sample of scored rows, ascending; all of them in a small pool."""
    sample_scores: Float[np.ndarray, "sample tasks"]
    sample_stderr: Float[np.ndarray, "sample tasks"]
    highest: Int[np.ndarray, "tasks ends"]
    """Rows with a task's highest scores, best first; -1 where the pool has fewer."""
    lowest: Int[np.ndarray, "tasks ends"]
    best: Int[np.ndarray, " best"]
    """Selected rows with most votes, of equal votes those with the highest mean score; best first."""
    rejected: Int[np.ndarray, " rejected"]
    """Rows not selected with fewest votes, of equal votes those with the lowest mean score; worst first."""

    @property
    def num_scored(self) -> int:
        return int(self.votes.sum())


def count(
    scores: ScoreStore,
    thresholds: Float[np.ndarray, " tasks"],
    selected: Bool[np.ndarray, " rows"],
    *,
    num_ends: int = 4,
    sample_rows: int = _SAMPLE_ROWS,
    seed: int = 0,
) -> ScoreNumbers:
    """Reads a score store once, block by block.

    A row that failed has NaN scores: it counts in `status` alone. A task votes for the rows with score `>=` its
    threshold.

    Args:
        scores: the store.
        thresholds: one per task.
        selected: which rows are selected.
        num_ends: rows kept at either end of each task.
        sample_rows: size of the sample that pictures are drawn from.
        seed: of the sample.
    """
    num_rows, num_tasks = scores.num_rows, len(scores.tasks)
    assert selected.shape == (num_rows,) and thresholds.shape == (num_tasks,)
    wanted = np.zeros(num_rows, bool)
    if num_rows > sample_rows:
        wanted[np.random.default_rng(seed).choice(num_rows, sample_rows, replace=False)] = True
    else:
        wanted[:] = True
    row_votes = np.zeros(num_rows, np.uint8)
    votes, votes_selected = np.zeros(num_tasks + 1, np.int64), np.zeros(num_tasks + 1, np.int64)
    shared = np.zeros((num_tasks, num_tasks), np.int64)
    kept, certain = np.zeros(num_tasks, np.int64), np.zeros(num_tasks, np.int64)
    codes = np.zeros(256, np.int64)
    sample, sample_scores, sample_stderr = [], [], []
    highest, lowest = Extremes(num_tasks, num_ends), Extremes(num_tasks, num_ends)
    best = rejected = np.zeros((3, 0))
    for start, influence, stderr, status in blocks(scores):
        codes += np.bincount(status, minlength=256)
        rows = start + np.flatnonzero(np.isfinite(influence).all(axis=1))
        values, errors = influence[rows - start], stderr[rows - start]
        votes_for = voted(values, thresholds)
        chosen = selected[rows]
        row_votes[rows] = votes_for.sum(axis=1)
        votes += np.bincount(row_votes[rows], minlength=num_tasks + 1)
        votes_selected += np.bincount(row_votes[rows][chosen], minlength=num_tasks + 1)
        as_numbers = votes_for.astype(np.float32)  # exact: a block has fewer than 2^24 rows
        shared += np.rint(as_numbers.T @ as_numbers).astype(np.int64)
        kept += votes_for[chosen].sum(axis=0)
        certain += (values - CERTAIN * np.nan_to_num(errors) >= thresholds).sum(axis=0)
        here = wanted[rows]
        sample.append(rows[here])
        sample_scores.append(values[here])
        sample_stderr.append(errors[here])
        highest.add(rows, values)
        lowest.add(rows, -values)
        consensus = np.stack([row_votes[rows], values.mean(axis=1), rows]).astype(float)
        best = _foremost(np.concatenate([best, consensus[:, chosen]], axis=1), num_ends)
        rejected = _foremost(np.concatenate([rejected, consensus[:, ~chosen]], axis=1), num_ends, sign=-1)
    return ScoreNumbers(
        tasks=list(scores.tasks),
        thresholds=thresholds,
        status={name(int(code)): int(codes[code]) for code in np.flatnonzero(codes)},
        votes=votes,
        votes_selected=votes_selected,
        row_votes=row_votes,
        shared=shared,
        kept=kept,
        certain=certain,
        sample=np.concatenate(sample),
        sample_scores=np.concatenate(sample_scores),
        sample_stderr=np.concatenate(sample_stderr),
        highest=highest.rows,
        lowest=lowest.rows,
        best=best[2].astype(np.int64),
        rejected=rejected[2].astype(np.int64),
    )


def _foremost(consensus: Float[np.ndarray, "3 rows"], num_ends: int, sign: int = 1) -> Float[np.ndarray, "3 ends"]:
    """The columns (votes, mean score, row) with most votes, then the highest mean score, then the lower row.

    Args:
        consensus: votes, mean scores and row numbers.
        num_ends: columns to keep.
        sign: -1 for fewest votes, then the lowest mean score.
    """
    votes, mean, rows = consensus
    return consensus[:, np.lexsort((rows, -sign * mean, -sign * votes))[:num_ends]]


def blocks(scores: ScoreStore) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(first row, influence `[n, S]`, stderr `[n, S]`, status `[n]`), whole write units at a time."""
    unit = scores.partition.chunk_rows
    step = max(1, BLOCK_ROWS // unit) * unit
    for start in range(0, scores.num_rows, step):
        part = slice(start, min(start + step, scores.num_rows))
        influence, stderr, status = (scores.stored(name, part) for name in ("influence", "stderr", "status"))
        yield start, influence, stderr, status


def name(code: int) -> str:
    """The name of a status code, as people say it.

    >>> name(3)
    'image missing'
    """
    known = {status.value: status.name.lower().replace("_", " ") for status in Status}
    return known.get(code, f"status {code}")


class Extremes:
    """The rows with each task's highest scores so far; of equal scores, the lower row."""

    def __init__(self, num_tasks: int, num_ends: int) -> None:
        self.rows = np.full((num_tasks, num_ends), -1, np.int64)
        self.scores = np.full((num_tasks, num_ends), -np.inf, np.float32)

    def add(self, rows: Int[np.ndarray, " block"], scores: Float[np.ndarray, "block tasks"]) -> None:
        num_tasks, num_ends = self.rows.shape
        for task in range(num_tasks):
            column = scores[:, task]
            if len(rows) > num_ends:
                border = np.partition(column, len(rows) - num_ends)[len(rows) - num_ends]
                best = np.flatnonzero(column >= border)
            else:
                best = np.arange(len(rows))
            all_rows = np.concatenate([self.rows[task], rows[best]])
            all_scores = np.concatenate([self.scores[task], column[best]])
            order = np.lexsort((all_rows, -all_scores))[:num_ends]
            order = order[np.isfinite(all_scores[order])]
            self.rows[task], self.scores[task] = -1, -np.inf
            self.rows[task, : len(order)], self.scores[task, : len(order)] = all_rows[order], all_scores[order]
