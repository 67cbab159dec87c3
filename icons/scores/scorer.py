"""How much each training row helps each task: the specialist stage (arXiv 2501.00654, section 3).

The influence of a training row on a task is the mean over the task's validation rows of the cosine between the two
gradients. A mean of products is a product with a mean, so each block of rows is multiplied once, with one averaged
vector per task, whatever the number of validation rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from icons.choices import Normalize, Reduce
from icons.scores.checkpoint import Checkpoint, variance
from icons.scores.rows import Block, Source, StoredRows, as_rows, blocks, ranges
from icons.scores.task_means import (
    check_agree,
    check_plain,
    check_whole,
    row_factor,
    task_vectors,
)
from icons.terminal import counted

Sources: TypeAlias = Source | Sequence[Source]


def influence(
    train: Sources,
    tasks: Mapping[str, Sources],
    *,
    normalize: Normalize = "projected",
    task_normalize: Normalize | None = None,
    weights: Sequence[float] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    reduce: Reduce = "max",
    drop_axes: int = 0,
    subspace: float | None = None,
    device: str | torch.device = "cpu",
    preconditioned_tasks: bool = False,
) -> Float[Tensor, "rows tasks"]:
    """Mean cosine similarity of each training row with each task's validation rows.

    Products and sums are float32. A row that failed is NaN for every task; a gradient of zeros has influence 0. A
    failed validation row is left out of its task's mean.

    Args:
        train: gradients of the training rows, `[N, K]`: a gradient store, an array or a tensor. Several checkpoints: a
            list of them.
        tasks: name -> gradients of the task's validation rows, `[M, K]`; with several checkpoints a list, one for each.
        normalize: what a training row is divided by: its projected norm (as the original and LESS do), the exact norm
            that the store holds, or nothing.
        task_normalize: the same for validation rows; default: as for training rows.
        weights: of the checkpoints; the result is the sum of weight times influence (in LESS, weights are learning
            rates). Default: the mean.
        groups: name -> tasks that are reduced to one column of this name, as the original does with MME's subtasks.
        reduce: `max` (the original's) or `mean` over a group's tasks.
        drop_axes: leading axes along which the validation rows differ that scores leave out, see `icons.scores.axes`.
        subspace: take cosines within the span of each task's validation rows, as many of its directions as hold this
            share of their squared length, see `icons.scores.span`. Standard errors are not known then.
        device: where the products are computed.
        preconditioned_tasks: take validation rows that went through a preconditioner, which are refused otherwise.

    Returns:
        `[N, S]` float32 on the CPU; tasks in the order given, a group at the place of its first task.

    Raises:
        ValueError: no task; an empty task or one without a usable row; sources of another model, projector or size; or
            units that are not written yet.

    Source: arXiv 2501.00654, section 3 (stage 1); LESS, arXiv 2402.04333, section 3.

    >>> train = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> influence(train, {"qa": torch.tensor([[1.0, 0.0], [0.0, 5.0]])}).tolist()
    [[0.5], [0.5]]
    """
    scorer = Scorer.of(
        train,
        tasks,
        normalize=normalize,
        task_normalize=task_normalize,
        weights=weights,
        groups=groups,
        reduce=reduce,
        drop_axes=drop_axes,
        subspace=subspace,
        device=device,
        preconditioned_tasks=preconditioned_tasks,
    )
    return torch.cat([part.influence for part in scorer.score(range(scorer.num_rows))])


class ScoredRows(NamedTuple):
    """Influence and its standard error for some consecutive rows, on the CPU; NaN for failed rows."""

    rows: range
    influence: Float[Tensor, "block tasks"]
    stderr: Float[Tensor, "block tasks"]
    pairs: dict[str, Float[Tensor, "block validation"]]


@dataclass(frozen=True)
class Scorer:
    """Everything that is fixed before the first row is read; `score` then goes over any rows.

    Attributes:
        checkpoints: one, or several whose scores are added.
        tasks: names of the columns.
        groups: column -> the places of the task vectors that are reduced to it (with `max`).
        normalize, task_normalize: as for `influence`.
        pairwise: also give every training row's product with every validation row.
        device: where the products are computed.
    """

    checkpoints: list[Checkpoint]
    tasks: list[str]
    groups: dict[str, list[int]]
    normalize: Normalize
    task_normalize: Normalize
    pairwise: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(
        cls,
        train: Sources,
        tasks: Mapping[str, Sources],
        *,
        normalize: Normalize = "projected",
        task_normalize: Normalize | None = None,
        weights: Sequence[float] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        reduce: Reduce = "max",
        pairwise: bool = False,
        drop_axes: int = 0,
        subspace: float | None = None,
        device: str | torch.device = "cpu",
        preconditioned_tasks: bool = True,
    ) -> "Scorer":
        """Checks that everything fits together and averages the validation rows. Arguments as for `influence`."""
        if drop_axes < 0:
            raise ValueError(f"drop axes: got {drop_axes}; expected 0 or more")
        if subspace is not None:
            _check_subspace(normalize, task_normalize, groups, reduce)
        trains = _as_list(train)
        if not tasks:
            raise ValueError("influence: got no task; expected at least one")
        on = {name: _as_list(sources) for name, sources in tasks.items()}
        if not preconditioned_tasks:
            check_plain(trains, on)
        for name, sources in on.items():
            if len(sources) != len(trains):
                raise ValueError(
                    f"task {name}: got {counted(len(sources), 'gradient store')} for "
                    f"{counted(len(trains), 'checkpoint')} of the training rows; expected one for each, in "
                    "the same order"
                )
        weight = [1 / len(trains)] * len(trains) if weights is None else list(weights)
        if len(weight) != len(trains):
            raise ValueError(
                f"weights: got {len(weight)} for {counted(len(trains), 'checkpoint')}; expected one for each"
            )
        for index, source in enumerate(trains):
            check_whole(source, "the training rows")
            if index:
                check_agree(trains[0], source, ("data.fingerprint",), "the first checkpoint", f"checkpoint {index + 1}")
        of_group = {task: name for name, members in (groups or {}).items() for task in members}
        unknown = [task for task in of_group if task not in on]
        if unknown:
            raise ValueError(f"group {of_group[unknown[0]]}: no task {unknown[0]!r}; expected some of {', '.join(on)}")
        task_norm = normalize if task_normalize is None else task_normalize
        where = torch.device(device)
        checkpoints, keep_rows = [], pairwise or subspace is not None
        for index, source in enumerate(trains):
            vectors = task_vectors(
                source, {name: of_task[index] for name, of_task in on.items()}, task_norm, where, keep_rows
            )
            vectors = vectors.without_axes(drop_axes).within(subspace)
            if reduce == "mean":
                vectors = vectors.pooled(of_group)
            checkpoints.append(Checkpoint(source, vectors, weight[index]))
        names = checkpoints[0].tasks.names
        columns: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            columns.setdefault(of_group.get(name, name), []).append(index)
        return cls(checkpoints, list(columns), columns, normalize, task_norm, pairwise, where)

    @property
    def num_rows(self) -> int:
        return self.checkpoints[0].train.partition.num_rows

    def score(self, rows: range) -> Iterator[ScoredRows]:
        """Scores of consecutive rows, block by block in order."""
        return map(self.score_block, self.blocks(rows))

    def blocks(self, rows: range) -> Iterator[tuple[Block, ...]]:
        """Blocks of consecutive rows in order, each as every checkpoint has it."""
        pieces = ranges(rows, self.checkpoints[0].train)
        return zip(*(blocks(each.train, pieces, self.device) for each in self.checkpoints), strict=True)

    def score_block(self, several: Sequence[Block]) -> ScoredRows:
        """One block of rows, as each checkpoint has it."""
        factors = [row_factor(block, self.normalize) for block in several]
        each = zip(self.checkpoints, several, factors, strict=True)
        parts = [checkpoint.product(block, factor) for checkpoint, block, factor in each]
        total = sum(part * c.weight for part, c in zip(parts, self.checkpoints, strict=True))
        assert isinstance(total, Tensor)
        projected = self.normalize == "projected", self.task_normalize == "projected"
        error = variance(self.checkpoints, several, factors, parts, projected).clamp(min=0).sqrt()
        done = torch.stack([block.done for block in several]).all(dim=0)
        influence, stderr = self.reduced(total, error)
        pairs = self.pairs(several, factors, done) if self.pairwise else {}
        failed = ~done[:, None]
        return ScoredRows(
            several[0].rows,
            influence.masked_fill(failed, torch.nan).cpu(),
            stderr.masked_fill(failed, torch.nan).cpu(),
            pairs,
        )

    def reduced(self, influence: Tensor, stderr: Tensor) -> tuple[Tensor, Tensor]:
        """Groups of task vectors -> columns: the highest, with its own standard error."""
        if all(len(places) == 1 for places in self.groups.values()):
            return influence, stderr
        scores, errors = [], []
        for places in self.groups.values():
            highest, which = influence[:, places].max(dim=1, keepdim=True)
            scores.append(highest)
            errors.append(stderr[:, places].gather(1, which))
        return torch.cat(scores, dim=1), torch.cat(errors, dim=1)

    def pairs(self, several: Sequence[Block], factors: Sequence[Tensor], done: Tensor) -> dict[str, Tensor]:
        """Per task, each row's product with each validation row; NaN for failed rows on either side."""
        products: dict[str, Tensor] = {}
        for checkpoint, block, factor in zip(self.checkpoints, several, factors, strict=True):
            spans = dict(zip(checkpoint.tasks.names, checkpoint.tasks.spans, strict=bool(checkpoint.tasks.spans)))
            for name, rows in checkpoint.tasks.rows.items():
                if name in spans:
                    part = spans[name].cosines(block.gradient) @ spans[name].rows.T * checkpoint.weight
                else:
                    part = (block.gradient @ rows.T) * factor[:, None] * checkpoint.weight
                products[name] = part if name not in products else products[name] + part
        return {name: part.masked_fill(~done[:, None], torch.nan).cpu() for name, part in products.items()}


def _check_subspace(
    normalize: Normalize, task_normalize: Normalize | None, groups: Mapping[str, Sequence[str]] | None, reduce: Reduce
) -> None:
    """Within a subspace there are cosines only, and no mean over a group's tasks, which have subspaces of their own."""
    if normalize != "projected" or task_normalize not in (None, "projected"):
        raise ValueError(
            f"subspace: got normalize={normalize!r}, task_normalize={task_normalize!r}; expected 'projected': within a "
            "subspace scores are cosines"
        )
    if groups and reduce == "mean":
        raise ValueError("subspace: got groups reduced to their mean; expected reduce='max', or no groups")


def _as_list(sources: Any) -> list[StoredRows]:
    """One source, or one per checkpoint, as a list of stores."""
    return [as_rows(source) for source in (sources if isinstance(sources, list | tuple) else [sources])]
