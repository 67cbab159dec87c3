"""`balanced`: rounds of choosing, in each of which validation rows weigh more the less they are served."""

import numpy as np
from jaxtyping import Float, Int

from icons.consensus.pairs import Pairs
from icons.consensus.ranking import best, ordered
from icons.consensus.rules.aggregates import mean
from icons.consensus.rules.evidence import Evidence


def balanced(evidence: Evidence, *, rounds: int = 30, scale: float = 1.0) -> Int[np.ndarray, " scored"]:
    """Chooses S towards the highest sum over validation rows m of g(x_m), x_m the summed influence of S on m.

    g(x) = -log(1 + exp(-x / s)) is concave and bounded above: a validation row that is served stops paying, and
    hurting one costs. In each round validation rows weigh g'(x_m), a row's score is its weighted sum of products, and
    the best of the rows not yet chosen are taken, as many in every round. Tasks weigh equally (times their weights),
    whatever their number of validation rows, and whatever the size of their influences: s is a task's own.

    Args:
        evidence: scores, and products with validation rows.
        rounds: in which rows are chosen; in fewer if fewer rows are wanted.
        scale: s, as a multiple of a task's mean |x_m| when rows are chosen by mean score.

    Raises:
        ValueError: no round, or a scale that is not above 0.
    """
    if rounds < 1 or not scale > 0:
        raise ValueError(f"balanced: got rounds={rounds}, scale={scale}; expected at least 1, and above 0")
    pairs, ties, free = evidence.pairs, evidence.ties, evidence.candidates
    total = min(evidence.wanted, int(free.sum()))
    spread = _scales(evidence, pairs, total) * scale
    weight = pairs.share * evidence.weights[pairs.task] / spread
    served = pairs.total(evidence.included)
    order: list[np.ndarray] = []
    for part in np.array_split(np.arange(total), min(rounds, max(total, 1))):
        scores = pairs.weighted(weight / (1 + np.exp(np.clip(served / spread, -50, 50))))
        chosen = best(free, scores, ties, len(part))
        free[chosen] = False
        served += pairs.total(chosen)
        order.append(ordered(chosen, scores, ties))
    return evidence.placed(np.concatenate(order))


def _scales(evidence: Evidence, pairs: Pairs, total: int) -> Float[np.ndarray, " validation"]:
    """Of each validation row its task's mean |x_m| when `total` rows are chosen by mean score; 1 where that is 0."""
    scores = np.full(evidence.columns.num_rows, np.nan)
    scores[evidence.columns.scored] = mean(evidence)
    chosen = best(evidence.candidates, scores, evidence.ties, total)
    reached = np.abs(pairs.total(np.concatenate([evidence.included, chosen])))
    of_task = np.bincount(pairs.task, weights=pairs.share * reached, minlength=len(pairs.tasks))
    return np.where(of_task > 0, of_task, 1.0)[pairs.task]
