"""The rules by name. A new one is a function from `Evidence` to a number per scored row, and its entry here."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from icons.consensus.rules import aggregates, baselines, likeness, turns
from icons.consensus.rules.balanced import balanced
from icons.consensus.rules.coverage import coverage
from icons.consensus.rules.evidence import Evidence
from icons.consensus.rules.herding import herding
from icons.consensus.rules.knn_kde import knn_kde


class Rule(NamedTuple):
    """A rule: `score(evidence, **options)`, what it does in a line, and whether it reads products with validation
    rows, or gradients.

    Keyword parameters of `score` are its options (`icons select --option NAME=NUMBER`).
    """

    score: Callable[..., Shaped[np.ndarray, " scored"]]
    does: str
    reads_pairs: bool = False
    reads_gradients: bool = False

    @property
    def options(self) -> dict[str, int | float]:
        """The options with their defaults."""
        parameters = inspect.signature(self.score).parameters.values()
        return {part.name: part.default for part in parameters if part.kind is part.KEYWORD_ONLY}

    def apply(self, evidence: Evidence, options: Mapping[str, int | float]) -> Shaped[np.ndarray, " scored"]:
        """The rule's numbers.

        Raises:
            ValueError: an option that the rule does not have, or a fraction for one that is a whole number.
        """
        given: dict[str, Any] = {}
        for name, value in options.items():
            if name not in self.options:
                known = ", ".join(f"{key}={default}" for key, default in self.options.items()) or "none"
                raise ValueError(f"option {name!r}: is none of this rule; it has {known}")
            if isinstance(self.options[name], int) and value != int(value):
                raise ValueError(f"option {name}: got {value}; expected a whole number")
            given[name] = type(self.options[name])(value)
        return self.score(evidence, **given)


RULES = {
    "vote": Rule(aggregates.vote, "each task votes for its best rows; those with most votes (the paper's)"),
    "mean": Rule(aggregates.mean, "highest mean score"),
    "max": Rule(aggregates.maximum, "highest score on any task"),
    "rank": Rule(aggregates.rank, "highest mean percentile rank"),
    "norm": Rule(aggregates.norm, "highest mean of standardised scores"),
    "borda": Rule(aggregates.borda, "points within each task's votes"),
    "direct_merge": Rule(aggregates.direct_merge, "mean over one pool of all tasks' validation rows"),
    "round_robin": Rule(turns.round_robin, "each task takes its best row in turn"),
    "bids": Rule(turns.bids, "the task worst served so far takes its best row"),
    "balanced": Rule(balanced, "rounds; validation rows count less the better they are served", True),
    "coverage": Rule(coverage, "one by one, for what is added to the validation rows served least", True),
    "round_robin_rows": Rule(turns.round_robin_rows, "each validation row takes its best row in turn", True),
    "doubly_greedy": Rule(likeness.doubly_greedy, "highest product with any validation row", True),
    "knn_kde": Rule(knn_kde, "nearest neighbours of the validation rows, fewer where rows lie densely", True, True),
    "transport": Rule(likeness.transport, "optimal transport from the validation rows", True),
    "herding": Rule(herding, "one by one, towards the tasks' mean gradient", False, True),
    "stratified": Rule(likeness.stratified, "the same share of every source (--source-field), its best by rank"),
    "filtered_random": Rule(baselines.filtered_random, "drawn from the better half by mean score"),
    "random": Rule(baselines.random, "drawn from all rows"),
    "loss": Rule(baselines.loss, "highest loss first"),
    "grad_norm": Rule(baselines.grad_norm, "highest gradient norm first"),
}
