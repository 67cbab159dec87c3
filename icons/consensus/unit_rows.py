"""Normalised gradients, block by block, those of several checkpoints side by side."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icons.consensus.ranking import best
from icons.scores import Scorer
from icons.scores.task_means import row_factor


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
        for several in self.scorer.blocks(range(self.scorer.num_rows)):
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

    @property
    def dim(self) -> int:
        return sum(int(checkpoint.train.gradients.shape[1]) for checkpoint in self.scorer.checkpoints)

    def of_tasks(self, groups: Mapping[str, Sequence[str]]) -> dict[str, Float[Tensor, "_ dim"]]:
        """Each task's normalised validation rows, those of a group's members together, without failed ones.

        For a scorer made with `pairwise`.
        """
        rows_of: dict[str, Tensor] = {}
        for task in self.scorer.tasks:
            members = [self.of_member(name) for name in groups.get(task, [task])]
            rows = torch.cat(members)
            rows_of[task] = rows[rows.isfinite().all(dim=1)]
        return rows_of

    def of_member(self, name: str) -> Float[Tensor, "_ dim"]:
        checkpoints = zip(self.scorer.checkpoints, self.roots, strict=True)
        return torch.cat([root * checkpoint.tasks.rows[name] for checkpoint, root in checkpoints], dim=1)
