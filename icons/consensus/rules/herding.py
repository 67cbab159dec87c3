"""`herding`: each row is chosen for what the rows before it leave of the tasks' mean gradient."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from icons.consensus.rules.evidence import Evidence
from icons.consensus.unit_rows import UnitRows

POOL_ROWS, SMALLEST_POOL = 8192, 1024
"""Rows of a pool: its gradients take 4 K bytes each in memory, their products with each other 256 MB."""


def herding(evidence: Evidence, *, rounds: int = 32) -> Int[np.ndarray, " scored"]:
    """Chooses rows whose sum points where the tasks' mean gradient points.

    With u the sum of the rows chosen so far and t the mean over tasks of their mean validation gradients (normalised
    rows; tasks by their weights), the next row is the one with the highest product with the residual t - a u, where
    a = max(0, t.u / u.u) leaves the least residual. A near-duplicate of a chosen row gains nothing, and so gives way.
    With up to 8,192 rows each choice is among all; with more, each of `rounds` looks at all rows makes a pool of those
    with the highest products, and its share of the choice goes on within it.

    Args:
        evidence: scores, and gradients.
        rounds: looks at all gradients.

    Raises:
        ValueError: no round.

    Source: Welling 2009 (herding); arXiv 2410.16710 (gradient pursuit), with equal coefficients.
    """
    if rounds < 1:
        raise ValueError(f"herding: got rounds={rounds}; expected at least 1")
    rows, ties, free = UnitRows(evidence.scorer), evidence.ties, evidence.candidates
    num_free = int(free.sum())
    total = min(evidence.wanted, num_free)
    least = max(total if num_free <= POOL_ROWS else -(-total // rounds), 1)
    most = max(least, num_free if num_free <= POOL_ROWS else min(max(2 * least, SMALLEST_POOL), POOL_ROWS))
    target = rows.target(evidence.weights)
    total_of = rows.sum_of(evidence.included) if len(evidence.included) else torch.zeros_like(target)
    order: list[int] = []
    while len(order) < total:
        pool, unit = rows.highest(target - _coefficient(target, total_of) * total_of, free, ties, most)
        chosen = _pursue(unit, ties[pool], target, total_of, min(least, total - len(order)))
        total_of = total_of + unit[chosen].sum(dim=0)
        free[pool[chosen]] = False
        order += pool[chosen].tolist()
    return evidence.placed(np.array(order, np.int64))


def _coefficient(target: Float[Tensor, " dim"], total: Float[Tensor, " dim"]) -> float:
    square = float(total @ total)
    return max(0.0, float(target @ total) / square) if square > 0 else 0.0


def _pursue(
    unit: Float[Tensor, "pool dim"],
    ties: Float[np.ndarray, " pool"],
    target: Float[Tensor, " dim"],
    total: Float[Tensor, " dim"],
    num: int,
) -> list[int]:
    """Places in the pool, one by one; level ones by `ties`, then by place."""
    gram = (unit @ unit.T).numpy()
    with_target, with_total = (unit @ target).double().numpy(), (unit @ total).double().numpy()
    square, along = float(total @ total), float(target @ total)
    rank = np.lexsort((np.arange(len(ties)), -ties))  # places from the first of level ones to the last
    free = np.ones(len(ties), bool)
    chosen: list[int] = []
    for _ in range(num):
        factor = max(0.0, along / square) if square > 0 else 0.0
        gain = np.where(free, with_target - factor * with_total, -np.inf)
        index = int(rank[gain[rank].argmax()])
        chosen.append(index)
        free[index] = False
        square += 2 * float(with_total[index]) + float(gram[index, index])
        along += float(with_target[index])
        with_total += gram[index]
    return chosen
