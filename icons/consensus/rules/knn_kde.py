"""`knn_kde`: mass from every validation row to its nearest training rows, thinned where these lie densely."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from icons.consensus.nearest import nearest_with_products
from icons.consensus.rules.evidence import Evidence
from icons.consensus.unit_rows import UnitRows

_SKETCH_DIM = 256
REFERENCE_ROWS = 1 << 16
_BLOCK_ROWS = 256


def knn_kde(
    evidence: Evidence, *, neighbours: int = 5000, alpha: float = 0.01, cost: float = 5.0, sigma: float = 0.75
) -> Float[np.ndarray, " scored"]:
    """The mass that a row receives from the validation rows it is near to.

    A validation row gives its mass (a task's share of 1 by its weight) to its nearest rows, to each in inverse
    proportion to the density of rows around it: near-duplicates share what one of them would get. How many neighbours
    it has is found by growing all neighbourhoods together until their cost outweighs their variety. Rows that receive
    nothing come last, all alike.

    The density of a row is the sum over neighbours of 1 - |x - y|^2 / sigma^2, where positive, of normalised
    gradients, from their first 256 numbers; with more than 65,536 rows near any validation row, that of a seeded
    sample of so many, scaled up.

    Args:
        evidence: products with validation rows, and gradients.
        neighbours: of each validation row that are looked at, and at most a tenth of the rows.
        alpha: weight of nearness against variety.
        cost: divides the cost of distance.
        sigma: radius of the density's kernel.

    Raises:
        ValueError: no neighbour, or an alpha, cost or sigma out of range.

    Source: arXiv 2410.11303 (TSDS, KNN-KDE), with products as cosines, and tasks that weigh equally.
    """
    if neighbours < 1 or not 0 < alpha < 1 or not cost > 0 or not sigma > 0:
        raise ValueError(
            f"knn_kde: got neighbours={neighbours}, alpha={alpha}, cost={cost}, sigma={sigma}; expected at least 1, "
            "between 0 and 1, above 0, and above 0"
        )
    pairs, free = evidence.pairs, evidence.candidates
    length = max(2, min(neighbours, -(-int(free.sum()) // 10)))
    lists, products = nearest_with_products(pairs, free, length)
    rows, distance = np.stack(lists), 1 - np.stack(products).astype(np.float64)
    near = np.unique(rows)
    inverse = np.ones(pairs.num_rows)
    inverse[near] = 1 / _density(UnitRows(evidence.scorer), near, sigma, evidence.seed)
    mass = pairs.share * evidence.weights[pairs.task] / evidence.weights.sum()
    received = _assign(rows, distance, inverse[rows], mass, alpha / cost, 1 - alpha, pairs.num_rows)
    return received[evidence.columns.scored]


def _density(unit: UnitRows, near: Int[np.ndarray, " near"], sigma: float, seed: int) -> Float[np.ndarray, " near"]:
    """1, for the row itself, plus the kernel's sum over the others."""
    sketches = _sketch(unit, near)
    reference = np.arange(len(near))
    if len(near) > REFERENCE_ROWS:
        reference = np.sort(np.random.default_rng(seed).choice(len(near), REFERENCE_ROWS, replace=False))
    others = sketches[torch.from_numpy(reference)]
    densities = np.empty(len(near))
    position = np.full(len(near), -1)
    position[reference] = np.arange(len(reference))
    for start in range(0, len(near), _BLOCK_ROWS):
        part = slice(start, min(start + _BLOCK_ROWS, len(near)))
        kernel = (1 - 2 * (1 - sketches[part] @ others.T) / sigma**2).clamp_(min=0)
        here = np.flatnonzero(position[part] >= 0)
        kernel[torch.from_numpy(here), torch.from_numpy(position[part][here])] = 0
        densities[part] = 1 + kernel.sum(dim=1).double().numpy() * (len(near) / len(reference))
    return densities.round(4)  # equal rows are level, wherever they stand


def _sketch(unit: UnitRows, near: Int[np.ndarray, " near"]) -> Float[Tensor, "near width"]:
    """The first numbers of each of these rows, normalised."""
    wanted = np.zeros(unit.scorer.num_rows, bool)
    wanted[near] = True
    sketched, start = torch.empty(0, 0), 0
    for part, rows in unit.blocks(_SKETCH_DIM):
        here = rows[torch.from_numpy(np.flatnonzero(wanted[part.start : part.stop]))]
        if not sketched.numel():
            sketched = torch.empty(len(near), rows.shape[1])
        sketched[start : start + len(here)] = torch.nn.functional.normalize(here, dim=1)
        start += len(here)
    return sketched


def _assign(
    rows: Int[np.ndarray, "validation near"],
    distance: Float[np.ndarray, "validation near"],
    inverse: Float[np.ndarray, "validation near"],
    mass: Float[np.ndarray, " validation"],
    price: float,
    most: float,
    num_rows: int,
) -> Float[np.ndarray, " rows"]:
    """The mass that every training row receives.

    All neighbourhoods grow together: the k-th neighbour of a validation row joins when the sum of inverse densities up
    to it is the next lowest. A neighbourhood up to k costs the sum over its members of (the distance of neighbour k + 1
    minus theirs), each over its density. Growth stops when `price` times the mean cost reaches `most`.
    """
    num_near = rows.shape[1]
    level = inverse.cumsum(axis=1)[:, : num_near - 1]
    spent = (distance * inverse).cumsum(axis=1)[:, : num_near - 1]
    cost = distance[:, 1:] * level - spent
    step = np.diff(cost, axis=1, prepend=0) * mass[:, None]
    order = np.argsort(level.ravel(), kind="stable")
    total = step.ravel()[order].cumsum()
    over = np.flatnonzero(price * total >= most)
    last = int(over[0]) if len(over) else len(order) - 1
    reached = float(level.ravel()[order[last]])
    flat = np.zeros(level.size, bool)
    flat[order[: last if len(over) else last + 1]] = True
    joined = flat.reshape(level.shape)
    joined[:, 0] = True
    part = np.where(joined, inverse[:, : num_near - 1] / reached, 0) * mass[:, None]
    left = np.maximum(mass - part.sum(axis=1), 0)
    received = np.bincount(rows[:, : num_near - 1].ravel(), weights=part.ravel(), minlength=num_rows)
    received += np.bincount(rows[np.arange(len(rows)), joined.sum(axis=1)], weights=left, minlength=num_rows)
    return received
