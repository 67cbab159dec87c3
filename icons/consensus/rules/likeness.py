"""Rules by which rows resemble validation rows: the most alike, or mass carried from validation rows to rows near."""

import numpy as np
import torch
from jaxtyping import Float

from icons.consensus.rules.evidence import Evidence


def doubly_greedy(evidence: Evidence) -> Float[np.ndarray, " scored"]:
    """The highest product with any validation row, times its task's weight.

    Source: arXiv 2602.14696 (doubly greedy).
    """
    pairs = evidence.pairs
    factor = torch.from_numpy(evidence.weights[pairs.task]).float()
    highest = np.empty(pairs.num_rows, np.float32)
    for rows, block in pairs.blocks():
        highest[rows] = block.mul_(factor).amax(dim=1).numpy()
    return highest[evidence.columns.scored].astype(np.float64)


def transport(
    evidence: Evidence, *, blur: float = 0.01, looseness: float = 1e-4, steps: int = 10
) -> Float[np.ndarray, " scored"]:
    """The mass that entropic unbalanced optimal transport carries to a row from the validation rows.

    The cost is (1 - product) / 2. Validation rows give away all of their mass, a task's share of 1 by its weight;
    training rows take about equal shares, the less strictly the smaller `looseness` (Kullback-Leibler).

    Args:
        evidence: products with validation rows.
        blur: of the entropy; the smaller, the more is given to the very nearest.
        looseness: weight of the training side's marginal.
        steps: Sinkhorn iterations, each a look at all products.

    Raises:
        ValueError: a blur below 0.006, which single precision cannot do; or no step.

    Source: arXiv 2602.14696 (unbalanced optimal transport); Chizat et al. 2018, scaling algorithms. Streamed, since the
    known libraries hold `[N, M]` in memory.
    """
    if not blur >= 0.006 or steps < 1:
        raise ValueError(f"transport: got blur={blur}, steps={steps}; expected at least 0.006, and at least 1")
    pairs, free = evidence.pairs, evidence.columns.scored
    given = pairs.share * evidence.weights[pairs.task] / evidence.weights.sum()
    share = torch.tensor(1 / int(free.sum()), dtype=torch.float64)
    power = looseness / (looseness + blur)
    taken = torch.ones(pairs.num_rows, dtype=torch.float64)
    give = torch.ones(pairs.width, dtype=torch.float64)
    masses = np.zeros(pairs.num_rows)
    for step in range(steps + 1):
        reached = torch.zeros(pairs.width, dtype=torch.float64)
        for rows, block in pairs.blocks():
            kernel = (block - 1).div_(2 * blur).exp_().double()
            kernel[torch.from_numpy(~free[rows])] = 0
            sent = kernel @ give
            if step:
                taken[rows] = (share / sent.clamp(min=1e-300)) ** power
            reached += taken[rows] @ kernel
            masses[rows] = (sent * taken[rows]).numpy()
        if step < steps:
            give = torch.from_numpy(given) / reached
    if not np.isfinite(masses).all():
        raise ValueError("transport: the masses are not finite; expected products between -1 and 1 (cosines)")
    return masses[free]


def stratified(evidence: Evidence) -> Float[np.ndarray, " scored"]:
    """The same share of every source, its best rows by mean percentile rank.

    Raises:
        ValueError: the sources are not given.
    """
    if evidence.sources is None:
        raise ValueError("got no sources; expected --source-field (in Python, budget={'sources': Sources(...)})")
    code = evidence.sources.code[evidence.columns.scored]
    order = np.lexsort((np.arange(len(code)), -evidence.tie, code))
    sizes = np.bincount(code, minlength=len(evidence.sources.names))
    start = np.cumsum(sizes) - sizes
    rank = np.empty(len(code))
    rank[order] = np.arange(len(code)) - start[code[order]]
    return -(rank + 0.5) / sizes[code]
