"""`coverage`: rows chosen one by one, each for what it adds to validation rows that are served least."""

import heapq

import numpy as np
import torch
from jaxtyping import Float, Int

from icons.consensus.pairs import Pairs
from icons.consensus.ranking import best
from icons.consensus.rules.evidence import Evidence

POOL_NUMBERS = 1 << 26
"""Products of a pool in memory: 256 MB in float32."""
_TINY = 1e-30


def coverage(evidence: Evidence, *, rounds: int = 50, better: float = 1.0) -> Int[np.ndarray, " scored"]:
    """Greedy choice of S for the highest sum over validation rows of the square root of S's summed positive products.

    Tasks weigh equally (times their weights), whatever their number of validation rows. What a row adds shrinks as
    others are chosen (the sum is submodular), so what it added before is an upper bound: the choice goes on within a
    pool of the best rows as long as no row outside it could be better, and then all rows are looked at again. The
    result is that of choosing one by one among all rows, unless that takes more than `rounds` looks: then a look
    yields its share of the rows all the same.

    Args:
        evidence: scores, and products with validation rows.
        rounds: looks at all rows.
        better: share of the scored rows, by mean score, within which rows are chosen.

    Raises:
        ValueError: no round, or a share that is not above 0 and at most 1.
    """
    if rounds < 1:
        raise ValueError(f"coverage: got rounds={rounds}; expected at least 1")
    pairs, ties, free = evidence.pairs, evidence.ties, evidence.better(better)
    total = min(evidence.wanted, int(free.sum()))
    weight = pairs.share * evidence.weights[pairs.task]
    served = pairs.total(evidence.included, positive=True)
    least = -(-total // rounds)
    most = max(least, min(max(4 * least, 1024), POOL_NUMBERS // pairs.width))
    order: list[int] = []
    while len(order) < total:
        gains = added(pairs, served, weight)
        pool = best(free, gains, ties, most)
        free[pool] = False
        outside = float(gains[free].max()) if free.any() else -np.inf
        chosen = _choose(pairs, pool, ties, served, weight, outside, min(least, total - len(order)), total - len(order))
        free[pool] = True
        free[chosen] = False
        order += chosen
    return evidence.placed(np.array(order, np.int64))


def added(
    pairs: Pairs, served: Float[np.ndarray, " validation"], weight: Float[np.ndarray, " validation"]
) -> Float[np.ndarray, " rows"]:
    """What each row would add."""
    gains, before = np.empty(pairs.num_rows, np.float32), torch.from_numpy(served).float()
    root, factor = before.sqrt(), torch.from_numpy(weight).float()
    for rows, block in pairs.blocks():
        block.clamp_(min=0)
        below = (block + before).sqrt_().add_(root).clamp_(min=_TINY)
        gains[rows] = block.mul_(factor).div_(below).sum(dim=1).numpy()
    return gains


def _choose(
    pairs: Pairs,
    pool: Int[np.ndarray, " pool"],
    ties: Float[np.ndarray, " rows"],
    served: Float[np.ndarray, " validation"],
    weight: Float[np.ndarray, " validation"],
    outside: float,
    least: int,
    most: int,
) -> list[int]:
    """Rows of a pool, one by one, until none of them surely adds more than `outside`; `least` at least, `most` at most.

    `served` is brought up to date.
    """
    products = pairs.rows(pool)
    np.maximum(products, 0, out=products)
    bound = outside * (1 + 1e-4) if np.isfinite(outside) else outside  # float32's, where all rows were looked at
    root = np.sqrt(served)

    def gain(index: int) -> float:  # sqrt(a + b) - sqrt(a) = b / (sqrt(a + b) + sqrt(a)), without loss of digits
        part = products[index]
        return float((part * weight / np.maximum(np.sqrt(served + part) + root, _TINY)).sum())

    heap = [(-gain(index), -ties[row], row, index) for index, row in enumerate(pool.tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and len(chosen) < most:
        _, tie, row, index = heapq.heappop(heap)
        now = (-gain(index), tie, row, index)
        if heap and heap[0] < now:
            heapq.heappush(heap, now)
            continue
        if -now[0] < bound and len(chosen) >= least:
            break
        chosen.append(row)
        served += products[index]
        root = np.sqrt(served)
    return chosen
