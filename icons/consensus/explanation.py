"""Explanation: why one row was selected, or was not: its scores against the tasks' thresholds, its votes, its rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TaskVerdict:
    """What one task says of a row.

    Attributes:
        task: its name.
        score: the row's influence on it.
        threshold: the least score that the task votes for.
        stderr: of the score; NaN where it is not known.
        pulled_by: validation rows that want the row most, and their products with it; empty unless the scores were made
            with `--top-pairs`.
    """

    task: str
    score: float
    threshold: float
    stderr: float
    pulled_by: Sequence[tuple[int, float]]

    @property
    def votes(self) -> bool:
        return self.score >= self.threshold


@dataclass(frozen=True)
class Explanation:
    """One row of a selection; printed, it is a small table.

    Attributes:
        row: the record's position in the data file.
        selected: whether it is in the selection.
        rank: its place by the rule's score, 1 the best; None for a row without a score.
        num_scored: rows that have a score.
        score: what the rule ranks by.
        votes: tasks that vote for it.
        tasks: each task's verdict.
    """

    row: int
    selected: bool
    rank: int | None
    num_scored: int
    score: float
    votes: int
    tasks: Sequence[TaskVerdict]

    def __str__(self) -> str:
        if self.rank is None:
            return f"row {self.row}: has no score (it failed), and cannot be selected"
        said = "selected" if self.selected else "not selected"
        lines = [f"row {self.row}: {said}; rank {self.rank:,} of {self.num_scored:,}, {self.votes} votes"]
        width = max(len(verdict.task) for verdict in self.tasks)
        for verdict in self.tasks:
            sign, error = ("≥" if verdict.votes else "<"), f" ± {verdict.stderr:.2g}" if verdict.stderr > 0 else ""
            line = f"  {verdict.task:<{width}}  {verdict.score: .4f}{error} {sign} {verdict.threshold:.4f}"
            pulled = ", ".join(f"{row} ({product:.3f})" for row, product in verdict.pulled_by)
            lines.append(line + (f"  validation rows {pulled}" if pulled else ""))
        return "\n".join(lines)


def explain(row: int, selection: Any, scores: Any) -> Explanation:
    """Why a row is in a selection, or is not.

    Args:
        row: the record's position in the data file.
        selection: an `icons.Selection`.
        scores: what it was selected from: a score store, or scores `[N, S]`.

    Raises:
        ValueError: there is no such row, or the scores are of other rows or tasks.
    """
    influence = getattr(scores, "influence", scores)
    num_rows, num_tasks = len(selection.votes), len(selection.tasks)
    if tuple(influence.shape) != (num_rows, num_tasks):
        raise ValueError(
            f"scores: got shape {tuple(influence.shape)}; expected [{num_rows}, {num_tasks}], as the selection has"
        )
    if not 0 <= row < num_rows:
        raise ValueError(f"row {row}: expected one of 0 to {num_rows - 1}")
    values = np.asarray(influence[row], np.float64)
    known = hasattr(scores, "stderr")
    errors = np.asarray(scores.stderr[row], np.float64) if known else np.full(num_tasks, np.nan)
    arrays: Mapping[str, Any] = getattr(scores, "arrays", {})
    verdicts = [
        TaskVerdict(
            task, float(values[i]), float(selection.thresholds[i]), float(errors[i]), _strongest(arrays, task, row)
        )
        for i, task in enumerate(selection.tasks)
    ]
    own = selection.score[row]
    rank = None
    if np.isfinite(own):
        tie = selection.percentile_rank
        ahead = (selection.score > own) | ((selection.score == own) & (tie > tie[row]))
        ahead |= (selection.score == own) & (tie == tie[row]) & (np.arange(num_rows) < row)
        rank = 1 + int(ahead.sum())
    return Explanation(
        row=row,
        selected=bool(np.isin(row, selection.rows)),
        rank=rank,
        num_scored=int(np.isfinite(selection.score).sum()),
        score=float(own),
        votes=int(selection.votes[row]),
        tasks=verdicts,
    )


def _strongest(arrays: Mapping[str, Any], task: str, row: int) -> list[tuple[int, float]]:
    """The kept validation rows of a score store made with `--top-pairs`, the strongest first."""
    if f"top_rows_{task}" not in arrays:
        return []
    rows, products = (np.asarray(arrays[f"top_{what}_{task}"][row]) for what in ("rows", "influence"))
    return [(int(one), float(product)) for one, product in zip(rows, products, strict=True) if one >= 0]
