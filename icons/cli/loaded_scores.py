"""LoadedScores: a score store whose scores are read once, and whose products with validation rows are computed once."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icons.cli.console import tell
from icons.consensus import Pairs
from icons.consensus.origin import scorer_of
from icons.scores import Scorer
from icons.store import ScoreStore


class LoadedScores:
    """Whatever else is asked of it, the store answers.

    Args:
        store: the score store.
        train, tasks: gradient stores in place of those that it names, see `icons.consensus.origin.scorer_of`.

    Attributes:
        kept: the products, once a rule has asked for them.
    """

    def __init__(self, store: ScoreStore, train: Sequence[str] | None, tasks: Mapping[str, Sequence[str]]) -> None:
        self.store, self.train, self.of_tasks = store, train, tasks
        self.influence = np.asarray(store.influence[:])
        self.kept: Pairs | None = None

    def pairs(self) -> Pairs:
        if self.kept is None:
            tell("products with single validation rows: one pass over the gradients")
            self.kept = Pairs.of_store(self.store, self.train, self.of_tasks)
        return self.kept

    def scorer(self, pairwise: bool) -> Scorer:
        return scorer_of(self.store, self.train, self.of_tasks, pairwise)

    def array(self, name: str) -> np.ndarray | None:
        return np.asarray(self.store.arrays[name][:]) if name in self.store.arrays else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def __enter__(self) -> "LoadedScores":
        return self

    def __exit__(self, *error: object) -> None:
        if self.kept is not None:
            self.kept.close()
