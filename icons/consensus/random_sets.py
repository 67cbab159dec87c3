"""Random sets of a selection's size, and what one pass over the gradients tells of them and of the selection."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icons.consensus.pairs import Pairs
from icons.consensus.unit_rows import UnitRows

_NUM_SETS = 100
"""Random sets that the selection is compared with."""
_SAMPLE_ROWS, _POOL_ROWS = 1024, 3072
"""Rows of the selection, and of the pool, whose gradients are compared with each other."""


@dataclass(frozen=True)
class Compared:
    """A number of the selection, and of random sets of its size: their mean, and the 2.5th and 97.5th percentile."""

    value: float
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, random: Sequence[float] | np.ndarray) -> "Compared":
        low, high = np.percentile(random, [2.5, 97.5])
        return cls(float(value), float(np.mean(random)), float(low), float(high))


def random_sets(
    rows: Int[np.ndarray, " selected"], scored: Bool[np.ndarray, " rows"], num_sets: int = _NUM_SETS, seed: int = 0
) -> Bool[np.ndarray, "rows sets"]:
    """The selection, and random sets of its size from the scored rows, as columns."""
    generator, known = np.random.default_rng(seed), np.flatnonzero(scored)
    sets = np.zeros((len(scored), 1 + num_sets), bool)
    sets[rows, 0] = True
    for number in range(1, 1 + num_sets):
        sets[generator.permutation(known)[: len(rows)], number] = True
    return sets


def sums_from_pairs(pairs: Pairs, sets: Bool[np.ndarray, "rows sets"]) -> dict[str, Float[np.ndarray, "_ sets"]]:
    """Summed influence of each set on each validation row, from products that are there already."""
    total = torch.zeros(pairs.width, sets.shape[1])
    for rows, block in pairs.blocks():
        total += block.T @ torch.from_numpy(sets[rows]).float()
    return {task: total[torch.from_numpy(pairs.task == index)].numpy() for index, task in enumerate(pairs.tasks)}


@dataclass(frozen=True)
class GradientPass:
    """What one pass over the gradients tells: sums of sets, and some rows themselves.

    Attributes:
        sums: `[sets, dim]`, sum of each set's normalised rows.
        chosen, pool: `[n, dim]` normalised rows of the selection and of the scored rows, seeded samples.
    """

    sums: Float[Tensor, "sets dim"]
    chosen: Float[Tensor, "chosen dim"]
    pool: Float[Tensor, "pool dim"]

    @classmethod
    def over(
        cls, unit: UnitRows, sets: Bool[np.ndarray, "rows sets"], scored: Bool[np.ndarray, " rows"], seed: int = 0
    ) -> "GradientPass":
        generator = np.random.default_rng(seed)
        wanted = [
            generator.permutation(np.flatnonzero(among))[:most]
            for among, most in ((sets[:, 0], _SAMPLE_ROWS), (scored, _POOL_ROWS))
        ]
        masks = np.zeros((len(scored), 2), bool)
        for number, rows in enumerate(wanted):
            masks[rows, number] = True
        sums = torch.zeros(sets.shape[1], unit.dim)
        kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        for part, gradients in unit.blocks():
            span = slice(part.start, part.stop)
            sums += torch.from_numpy(sets[span]).float().T @ gradients
            for number, several in enumerate(kept):
                several.append(gradients[torch.from_numpy(masks[span, number])])
        return cls(sums, torch.cat(kept[0]), torch.cat(kept[1]))

    def sums_on(self, rows: Mapping[str, Float[Tensor, "_ dim"]]) -> dict[str, Float[np.ndarray, "_ sets"]]:
        """Summed influence of each set on each validation row; task -> its normalised validation rows."""
        return {task: (part @ self.sums.T).numpy() for task, part in rows.items()}

    def effective(self, seed: int = 0) -> Compared | None:
        """Effective number of rows of 1,000; None if there are fewer than 2 to compare."""
        num = len(self.chosen)
        if num < 2 or len(self.pool) < num:
            return None
        squares = (self.pool @ self.pool.T).square().numpy()
        generator = np.random.default_rng(seed)
        drawn = [generator.permutation(len(squares))[:num] for _ in range(_NUM_SETS)]
        value = effective_rows((self.chosen @ self.chosen.T).square().numpy())
        return Compared.of(value, [effective_rows(squares[np.ix_(rows, rows)]) for rows in drawn])


def effective_rows(squares: Float[np.ndarray, "rows rows"], num: int = 1000) -> float:
    """Of `num` rows, how many are different: num / (1 + (num - 1) q), q the mean squared cosine of two of them.

    It is the participation ratio of their covariance: 1 if all rows are the same, `num` if they are orthogonal.

    >>> effective_rows(np.ones((3, 3))), effective_rows(np.eye(3))
    (1.0, 1000.0)
    """
    size = len(squares)
    mean = float((squares.sum(dtype=np.float64) - np.trace(squares)) / (size * (size - 1)))
    return num / (1 + (num - 1) * mean)
