"""Overlap of selections, and of what the tasks vote for (the paper's heat map)."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from icons.consensus.rules import Columns, threshold, voted
from icons.consensus.votes import Scores, matrix_of

BLOCK_ROWS = 1 << 20


@dataclass(frozen=True)
class Overlap:
    """What two lists have in common; an entry that stands in a list twice counts twice."""

    num_a: int
    num_b: int
    shared: int

    @property
    def share_of_a(self) -> float:
        return self.shared / max(self.num_a, 1)

    @property
    def share_of_b(self) -> float:
        return self.shared / max(self.num_b, 1)

    @property
    def jaccard(self) -> float:
        """Shared entries as a share of those in either list."""
        return self.shared / max(self.num_a + self.num_b - self.shared, 1)

    def by_chance(self, num_rows: int) -> float:
        """Entries that two random selections of these sizes from `num_rows` rows would share."""
        return self.num_a * self.num_b / num_rows


def overlap(a: Iterable[int | str], b: Iterable[int | str]) -> Overlap:
    """Counts what two lists have in common.

    >>> overlap([1, 2, 3], [2, 3, 4, 5])
    Overlap(num_a=3, num_b=4, shared=2)
    """
    one, other = Counter(a), Counter(b)
    return Overlap(one.total(), other.total(), (one & other).total())


def task_overlap(
    scores: Scores | Float[np.ndarray, "rows tasks"], fraction: float = 0.2
) -> Float[np.ndarray, "tasks tasks"]:
    """Of the rows that a task votes for (the matrix's row), the share that another task votes for too (its column).

    A task votes for the rows at or above its own (100 - p)-th percentile, p = 100 `fraction`. Chance gives `fraction`.
    Rows without a score count nowhere.

    Source: arXiv 2501.00654, the pairwise overlap heat map.

    >>> task_overlap(np.array([[0.9, 0.1], [0.8, 0.9], [0.1, 0.8], [0.2, 0.2]], dtype=np.float32), 0.5).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    matrix, tasks = matrix_of(scores)
    columns = Columns(matrix, tasks)
    thresholds = np.array(columns.each(lambda column: threshold(column, fraction)))
    shared = np.zeros((len(tasks), len(tasks)))
    for start in range(0, len(matrix), BLOCK_ROWS):
        votes = voted(matrix[start : start + BLOCK_ROWS], thresholds).astype(np.float32)  # exact below 2^24 rows
        shared += votes.T @ votes
    return shared / np.maximum(np.diag(shared), 1)[:, None]
