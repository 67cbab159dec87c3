"""`herding`: each row is chosen for what the rows before it leave of the tasks' mean gradient."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icons.consensus.ranking import best
from icons.consensus.rules.evidence import Evidence
from icons.scores import Scorer
from icons.scores.rows import blocks, ranges
from icons.scores.task_means import row_factor

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
        pool, unit = rows.highest(target - coefficient(target, total_of) * total_of, free, ties, most)
        chosen = pursue(unit, ties[pool], target, total_of, min(least, total - len(order)))
        total_of = total_of + unit[chosen].sum(dim=0)
        free[pool[chosen]] = False
        order += pool[chosen].tolist()
    return evidence.placed(np.array(order, np.int64))


def coefficient(target: Float[Tensor, " dim"], total: Float[Tensor, " dim"]) -> float:
    square = float(total @ total)
    return max(0.0, float(target @ total) / square) if square > 0 else 0.0


def pursue(
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
        place = int(rank[gain[rank].argmax()])
        chosen.append(place)
        free[place] = False
        square += 2 * float(with_total[place]) + float(gram[place, place])
        along += float(with_target[place])
        with_total += gram[place]
    return chosen


class UnitRows:
    """Normalised training rows; those of several checkpoints side by side, so that products are weighted sums."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.roots = [checkpoint.weight**0.5 for checkpoint in scorer.checkpoints]

    def target(self, weights: Float[np.ndarray, " tasks"]) -> Float[Tensor, " dim"]:
        """The mean over tasks, by their weights, of their mean validation rows; of a group, of its members' means."""
        parts = []
        for checkpoint, root in zip(self.scorer.checkpoints, self.roots, strict=True):
            means = torch.stack([checkpoint.tasks.mean[places].mean(dim=0) for places in self.scorer.groups.values()])
            parts.append(root * (torch.from_numpy(weights / weights.sum()).float() @ means))
        return torch.cat(parts)

    def blocks(self, width: int | None = None) -> Iterator[tuple[range, Float[Tensor, "block dim"]]]:
        """All rows, block by block: the whole of them, or their first `width` numbers at each checkpoint."""
        pieces = ranges(range(self.scorer.num_rows), self.scorer.checkpoints[0].train)
        streams = [blocks(checkpoint.train, pieces, self.scorer.device) for checkpoint in self.scorer.checkpoints]
        for several in zip(*streams, strict=True):
            parts = [
                block.gradient[:, :width] * (root * row_factor(block, self.scorer.normalize))[:, None]
                for block, root in zip(several, self.roots, strict=True)
            ]
            yield several[0].rows, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def sum_of(self, rows: Int[np.ndarray, " some"]) -> Float[Tensor, " dim"]:
        wanted = np.zeros(self.scorer.num_rows, bool)
        wanted[rows] = True
        return torch.stack(
            [unit[torch.from_numpy(wanted[part.start : part.stop])].sum(dim=0) for part, unit in self.blocks()]
        ).sum(dim=0)

    def highest(
        self,
        direction: Float[Tensor, " dim"],
        free: Bool[np.ndarray, " rows"],
        ties: Float[np.ndarray, " rows"],
        num: int,
    ) -> tuple[Int[np.ndarray, " pool"], Float[Tensor, "pool dim"]]:
        """The free rows with the highest products with a direction, ascending, and their gradients; one look at all."""
        scores = np.full(self.scorer.num_rows, -np.inf)
        rows, kept, border = [np.empty(0, np.int64)], [torch.empty(0, len(direction))], -np.inf
        for part, unit in self.blocks():
            products = (unit @ direction).double().numpy()
            here = np.flatnonzero(free[part.start : part.stop] & (products >= border))
            scores[here + part.start] = products[here]
            rows.append(here + part.start)
            kept.append(unit[torch.from_numpy(here)])
            if sum(map(len, rows)) > 2 * num or part.stop == self.scorer.num_rows:
                every = np.concatenate(rows)
                inside = np.zeros(self.scorer.num_rows, bool)
                inside[every] = True
                rows = [best(inside, scores, ties, num)]
                kept = [torch.cat(kept)[torch.from_numpy(np.searchsorted(every, rows[0]))]]
                border = float(scores[rows[0]].min()) if len(rows[0]) == num else -np.inf
        return rows[0], kept[0]
