"""What a rule may look at, and how much is wanted of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from icons.consensus.budget import Sources
from icons.consensus.pairs import Pairs
from icons.consensus.ranking import best
from icons.consensus.rules.columns import Columns
from icons.scores import Scorer


@dataclass(frozen=True)
class Evidence:
    """Scores, and on demand the products with single validation rows.

    A rule gives a number for every row that has a score, in the order of `columns`; higher is better, ties go to the
    row with the higher `tie`, then to the lower row.

    Attributes:
        scores: what `select` was given: a score store, an array, a tensor.
        columns: the scores of rows that have one.
        thresholds: `[S]`, each task's.
        weights: `[S]` of the tasks.
        votes: of the scored rows.
        tie: mean percentile rank of the scored rows.
        wanted: rows to choose, those that are in anyway not counted.
        included: rows that are in anyway.
        excluded: rows that are not to be chosen.
        seed: of rules that draw.
        values: losses or norms, if they were given.
        num_validation: validation rows per task, if they were given.
        sources: the source of each row, if it was given.
        open_pairs: gives the products, or says what is missing.
        open_scorer: gives the gradients that the scores come from, likewise.
    """

    scores: Any
    columns: Columns
    thresholds: Float[np.ndarray, " tasks"]
    weights: Float[np.ndarray, " tasks"]
    votes: Int[np.ndarray, " scored"]
    tie: Float[np.ndarray, " scored"]
    wanted: int
    included: Int[np.ndarray, " included"]
    excluded: Int[np.ndarray, " excluded"]
    seed: int
    values: Shaped[np.ndarray, " rows"] | None
    num_validation: Sequence[int] | None
    sources: Sources | None
    open_pairs: Callable[[], Pairs]
    open_scorer: Callable[[], Scorer]

    @property
    def candidates(self) -> Bool[np.ndarray, " rows"]:
        """Rows that have a score, and are neither in anyway nor to be left out."""
        candidates = self.columns.scored.copy()
        candidates[self.included] = candidates[self.excluded] = False
        return candidates

    @property
    def ties(self) -> Float[np.ndarray, " rows"]:
        """`tie` of every row; NaN for one without a score."""
        ties = np.full(self.columns.num_rows, np.nan)
        ties[self.columns.scored] = self.tie
        return ties

    @property
    def pairs(self) -> Pairs:
        """Products with single validation rows.

        Raises:
            ValueError: they cannot be had; or a row has a score but no products, so they belong to other gradients.
        """
        pairs = self.open_pairs()
        lacking = np.flatnonzero(self.columns.scored & ~pairs.done)
        if len(lacking):
            raise ValueError(
                f"row {lacking[0]}: has a score, but no product with a validation row ({len(lacking):,} such rows); "
                "expected the gradient stores that the scores were made from: make the scores anew"
            )
        return pairs

    @property
    def scorer(self) -> Scorer:
        """The gradients that the scores come from.

        Raises:
            ValueError: they cannot be had.
        """
        return self.open_scorer()

    def better(self, share: float) -> Bool[np.ndarray, " rows"]:
        """Candidates within this share of the scored rows by mean score over tasks.

        Raises:
            ValueError: a share that is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"got better={share}; expected a share above 0 and at most 1")
        if share == 1:
            return self.candidates
        columns = self.columns
        scores = columns.total(lambda column, task: column.astype(np.float64), self.weights)
        inside = best(np.ones(len(scores), bool), scores, self.tie, max(1, round(share * len(scores))))
        better = np.zeros(columns.num_rows, bool)
        better[np.flatnonzero(columns.scored)[inside]] = True
        return better & self.candidates

    def placed(self, order: Int[np.ndarray, " some"]) -> Int[np.ndarray, " scored"]:
        """Numbers that rank rows in this order, the first highest; rows that are not in it come after, all alike."""
        places = np.full(self.columns.num_rows, len(order), np.int64)
        places[order] = np.arange(len(order))
        return -places[self.columns.scored]

    def column_of(self, name: str) -> Float[np.ndarray, " scored"]:
        """`loss` or `norm` of every scored row, from `values` or the score store; NaN as the lowest.

        Raises:
            ValueError: neither has it.
        """
        values, num_rows = self.values, self.columns.num_rows
        arrays: Mapping[str, Any] = getattr(self.scores, "arrays", {})
        if values is None and name in arrays:
            values = np.asarray(arrays[name][:])
        if values is None or values.shape != (num_rows,):
            raise ValueError(f"got no {name} per row; expected a score store that has it, or values [{num_rows}]")
        return np.nan_to_num(values.astype(np.float64), nan=-np.inf)[self.columns.scored]
