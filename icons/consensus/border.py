"""Which part of a selection is certain, given that every score carries a projection's standard error.

Each task's score is moved by 1.96 standard errors, all tasks of a row at once, down for a selected row and up for one
that is not. A selected row that stays above the border is certain at 95 %; one that does not could swap places with a
row that then reaches it. Moving all tasks together is right if their errors are equal, and careful if they are
independent. The border itself is kept: it rests on many rows, whose errors cancel.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from icons.consensus.votes import Selection

CERTAIN = 1.96
"""Standard errors on either side of a 95 % interval."""
_ENOUGH = 0.9
"""Share of the selection that has to be certain for K to count as large enough."""
_WORTH = 1  # per cent of the selection: what a four times as large K is advised for
BLOCK_ROWS = 1 << 16
_TABLE_ROWS = 1 << 17
_WITH_ERRORS = ("vote", "mean", "direct_merge", "max", "rank", "norm")
Rows: TypeAlias = Int[np.ndarray, " some"]
RowScores: TypeAlias = Float[np.ndarray, "some tasks"]


@dataclass(frozen=True)
class Border:
    """How much of a selection its error bars leave open.

    Attributes:
        selected: rows in the selection.
        certain: of them, those that stay selected wherever in their 95 % intervals the scores are.
        may_enter: rows that are not selected and could be.
        certain_at_4_dim: what `certain` would be with four times as large a K, which halves the errors.
        dim: K, if it is known.
    """

    selected: int
    certain: int
    may_enter: int
    certain_at_4_dim: int
    dim: int | None = None

    @property
    def may_leave(self) -> int:
        """Selected rows that are not certain."""
        return self.selected - self.certain

    @property
    def share(self) -> float:
        return self.certain / max(self.selected, 1)

    @property
    def is_enough(self) -> bool:
        """Whether K was large enough: at least 90 % of the selection is certain."""
        return self.share >= _ENOUGH

    def verdict(self) -> str:
        """What this says about K, in a sentence."""
        dim = "K" if self.dim is None else f"K = {self.dim:,}"
        if self.certain == self.selected and self.may_enter == 0:
            return f"{dim} was large enough: no row could swap."
        if self.is_enough:
            return f"{dim} was large enough: {100 * self.share:.1f} % of the selection is certain."
        four = "four times as large a K" if self.dim is None else f"--dim {4 * self.dim}"
        at_4 = 100 * self.certain_at_4_dim / max(self.selected, 1)
        if at_4 - 100 * self.share < _WORTH:
            return f"{dim} leaves the border open, and so would {four}: the scores lie too close together."
        return f"{dim} leaves the border open; with {four} {at_4:.1f} % of the selection would be certain."


def border(selection: Selection, influence: Any, stderr: Any, dim: int | None = None) -> Border | None:
    """Counts certain and uncertain rows; None for a method or scores without error bars, or a selection with quotas,
    whose border is not one line.

    Args:
        selection: made from `influence`.
        influence: `[N, S]`, an array or a store's.
        stderr: `[N, S]`, likewise; NaN counts as 0, unless all are.
        dim: K, for the verdict.
    """
    if selection.method not in _WITH_ERRORS or selection.settings.get("is_bounded") or len(selection.rows) == 0:
        return None
    line = Line.of(selection, influence)
    selected = np.zeros(len(selection.votes), bool)
    selected[selection.rows] = True
    certain = certain_at_4 = may_enter = 0
    for start in range(0, len(selected), BLOCK_ROWS):
        part = slice(start, min(start + BLOCK_ROWS, len(selected)))
        here = np.flatnonzero(np.isfinite(selection.score[part]))
        rows, scores = here + start, np.asarray(influence[part])[here]
        errors = np.asarray(stderr[part])[here]
        if len(here) and np.isnan(errors).all():
            return None
        errors = np.nan_to_num(errors)
        inside = selected[rows]
        certain += int(line.above(rows[inside], scores[inside], errors[inside], True).sum())
        certain_at_4 += int(line.above(rows[inside], scores[inside], errors[inside] / 2, True).sum())
        may_enter += int(line.above(rows[~inside], scores[~inside], errors[~inside], False).sum())
    return Border(len(selection.rows), certain, may_enter, certain_at_4, dim)


@dataclass(frozen=True)
class Line:
    """The last selected row's score and percentile rank, and what is needed to move a row towards them."""

    selection: Selection
    score: float
    tie: float
    weights: Float[np.ndarray, " tasks"]
    spreads: Float[np.ndarray, " tasks"]
    tables: list[Float[np.ndarray, " table"]]

    @classmethod
    def of(cls, selection: Selection, influence: Any) -> "Line":
        rows = selection.rows
        last = rows[np.lexsort((selection.percentile_rank[rows], selection.score[rows]))[0]]
        some = np.asarray(influence[:: -(-len(selection.votes) // _TABLE_ROWS)])
        some = some[np.isfinite(some).all(axis=1)]
        weights = selection.settings.get("merge_weights") or selection.settings["weights"]
        return cls(
            selection=selection,
            score=float(selection.score[last]),
            tie=float(selection.percentile_rank[last]),
            weights=np.array(list(weights.values())),
            spreads=some.std(axis=0, dtype=np.float64),
            tables=list(np.sort(some, axis=0).T.copy()),
        )

    def above(self, rows: Rows, scores: RowScores, errors: RowScores, selected: bool) -> Bool[np.ndarray, " some"]:
        """Which rows are above the border when all their scores are wrong by 1.96 standard errors: those of selected
        rows, which stay at its level too, too high, and those of others too low."""
        moved = scores + np.float32(-CERTAIN if selected else CERTAIN) * errors
        score = self.score_of(rows, scores, moved)
        level = score == self.score
        above = score > self.score
        tie = self.tie_of(rows[level], scores[level], moved[level])
        above[level] = tie >= self.tie if selected else tie > self.tie
        return above

    def score_of(self, rows: Rows, scores: RowScores, moved: RowScores) -> Float[np.ndarray, " some"]:
        """What the method makes of the moved scores of single rows."""
        before = self.selection.score[rows]
        match self.selection.method:
            case "vote":
                votes = np.zeros(len(rows))
                for task, weight in enumerate(self.weights):  # added one by one as in the selection: ties stay ties
                    votes += (moved[:, task] >= self.selection.thresholds[task]) * weight
                return votes
            case "max":
                return (moved * self.weights).max(axis=1)
            case "rank":
                return self.tie_of(rows, scores, moved)
            case "norm":
                step = np.divide(moved - scores, self.spreads, where=self.spreads > 0, out=np.zeros(scores.shape))
                return before + step @ self.weights / self.weights.sum()
            case _:
                return before + (moved - scores).astype(np.float64) @ self.weights / self.weights.sum()

    def tie_of(self, rows: Rows, scores: RowScores, moved: RowScores) -> Float[np.ndarray, " some"]:
        """Mean percentile rank of the moved scores, from tables of each task's scores."""
        rank = self.selection.percentile_rank[rows].copy()
        weights = np.array(list(self.selection.settings["weights"].values()))
        for task, table in enumerate(self.tables):
            step = np.searchsorted(table, moved[:, task]) - np.searchsorted(table, scores[:, task])
            rank += weights[task] / weights.sum() * step / len(table)
        return rank
