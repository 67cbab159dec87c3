"""What a task's validation rows come down to: one averaged vector per task, and what its error bars need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from icons.agreement import MULTIPLIED, check_compatible, lookup
from icons.batch import Status
from icons.choices import Normalize
from icons.kronecker import ROOT
from icons.scores.axes import leading_axes, without
from icons.scores.rows import Block, StoredRows, blocks, ranges
from icons.scores.span import Span, span_of
from icons.scores.stderr import mean_squared_cosine

_NORMALIZE = get_args(Normalize)
SAMPLE_ROWS = 256
"""Validation rows, evenly spaced, from which the mean squared cosine between a task's rows is estimated."""


@dataclass(frozen=True)
class TaskVectors:
    """The tasks of one checkpoint.

    Attributes:
        names: of the tasks.
        mean: each task's average validation row after normalisation, `[V, K]` float32.
        num_rows: validation rows in each average.
        overlap: mean squared cosine over all pairs of a task's rows, each with itself included.
        sample: the rows it was estimated from.
        exact: the projection is the identity, so that scores have no error.
        rows: all validation rows after normalisation, if they were asked for; NaN for a failed row.
        spans: each task's, if scores are to be cosines within them.
    """

    names: list[str]
    mean: Float[Tensor, "vectors dim"]
    num_rows: list[int]
    overlap: Float[Tensor, " vectors"]
    sample: list[Float[Tensor, "_ dim"]]
    exact: bool
    rows: dict[str, Float[Tensor, "_ dim"]] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)

    @property
    def square(self) -> Float[Tensor, " vectors"]:
        """Squared norm of each average."""
        return self.mean.square().sum(dim=1)

    def without_axes(self, count: int) -> "TaskVectors":
        """Without the leading axes along which the tasks' rows differ, see `icons.scores.axes`; 0: as they are.

        Raises:
            ValueError: the rows do not vary along so many axes.
        """
        if count == 0:
            return self
        axes = leading_axes(self.sample, count)
        samples = [without(rows, axes) for rows in self.sample]
        return replace(
            self,
            mean=without(self.mean, axes),
            overlap=_overlaps(samples),
            sample=samples,
            rows={name: without(rows, axes) for name, rows in self.rows.items()},
        )

    def within(self, share: float | None) -> "TaskVectors":
        """With the spans that hold `share` of the rows' squared length, see `icons.scores.span`; None: as it is."""
        if share is None:
            return self
        return replace(self, spans=[span_of(self.rows[name], share) for name in self.names])

    def pooled(self, group: Mapping[str, str]) -> "TaskVectors":
        """With the tasks of a group replaced by one vector, the mean of their means, whatever their sizes."""
        members: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            members.setdefault(group.get(name, name), []).append(index)
        samples = [torch.cat([self.sample[index] for index in places]) for places in members.values()]
        return TaskVectors(
            names=list(members),
            mean=torch.stack([self.mean[places].mean(dim=0) for places in members.values()]),
            num_rows=[sum(self.num_rows[index] for index in places) for places in members.values()],
            overlap=_overlaps(samples),
            sample=samples,
            exact=self.exact,
            rows=self.rows,
        )


def task_vectors(
    train: StoredRows,
    tasks: Mapping[str, StoredRows],
    normalize: Normalize,
    device: torch.device,
    keep_rows: bool = False,
) -> TaskVectors:
    """Averages each task's usable validation rows, and checks that they can be multiplied with the training rows.

    Raises:
        ValueError: an unknown normalisation; a task without rows, without a usable row or with units not yet written;
            or one of another model, projector or dimension than the training rows.
    """
    if normalize not in _NORMALIZE:
        raise ValueError(f"normalisation {normalize!r}: expected one of {', '.join(_NORMALIZE)}")
    means, counts, samples, rows = [], [], [], {}
    for name, source in tasks.items():
        _check_task(train, source, name)
        total = torch.zeros(source.gradients.shape[1], dtype=torch.float64, device=device)
        num_usable, sample, kept = 0, [], []
        step = -(-source.partition.num_rows // SAMPLE_ROWS)
        for block in blocks(source, ranges(range(source.partition.num_rows), source), device):
            normalised = block.gradient * row_factor(block, normalize)[:, None]
            usable = normalised[block.done]
            total += usable.sum(dim=0, dtype=torch.float64)
            sample.append(usable[-num_usable % step :: step])
            num_usable += len(usable)
            if keep_rows:
                kept.append(normalised.masked_fill(~block.done[:, None], torch.nan))
        if num_usable == 0:
            raise ValueError(
                f"task {name}: none of its {source.partition.num_rows} validation rows is usable; expected at least one"
            )
        means.append((total / num_usable).float())
        counts.append(num_usable)
        samples.append(torch.cat(sample))
        if keep_rows:
            rows[name] = torch.cat(kept)
    exact = train.manifest.get("projector", {}).get("kind") == "identity"
    return TaskVectors(list(tasks), torch.stack(means), counts, _overlaps(samples), samples, exact, rows)


def _overlaps(samples: Sequence[Float[Tensor, "_ dim"]]) -> Float[Tensor, " vectors"]:
    return torch.tensor([mean_squared_cosine(rows) for rows in samples], device=samples[0].device)


def row_factor(block: Block, normalize: Normalize) -> Float[Tensor, " block"]:
    """What each row of a block is multiplied by; 0 for a gradient of zeros."""
    if normalize == "none":
        return block.scale
    length = block.length if normalize == "projected" else block.norm
    numerator = torch.ones_like(block.scale) if normalize == "projected" else block.scale
    return torch.where(length > 0, numerator / length, torch.zeros_like(length))


def _check_task(train: StoredRows, task: StoredRows, name: str) -> None:
    if task.partition.num_rows == 0:
        raise ValueError(f"task {name}: has no validation rows; expected at least one")
    dims = train.gradients.shape[1], task.gradients.shape[1]
    if dims[0] != dims[1]:
        raise ValueError(
            f"dim: the training rows have {dims[0]} numbers each, task {name} has {dims[1]}; they must agree: compute "
            "both with the same --dim"
        )
    check_whole(task, f"task {name}")
    check_agree(train, task, MULTIPLIED, "the training rows", f"task {name}")


def check_plain(train: Sequence[StoredRows], tasks: Mapping[str, Sequence[StoredRows]]) -> None:
    """Refuses validation rows that went through an optimizer's preconditioner, as training rows do: the cosine is that
    of a training step with a plain gradient (arXiv 2501.00654, section 3; LESS, section 3.2). Where training rows are
    divided by the root of a curvature, validation rows must be too, by the same one.

    Args:
        train: of each checkpoint.
        tasks: of each task, likewise.

    Raises:
        ValueError: the first task with other rows.
    """
    for name, sources in tasks.items():
        for own, source in zip(train, sources, strict=False):  # their numbers are compared elsewhere
            form, of_training = (lookup(each.manifest or {}, "preconditioner.form") for each in (source, own))
            if of_training == ROOT and source.manifest:
                remedy = "they must agree: compute the task's with --task, the same --factors and --damping"
                both = (own.manifest or {}, source.manifest)
                check_compatible(*both, ["preconditioner"], "the training rows", f"task {name}", remedy)
            elif form not in (None, "none"):
                raise ValueError(
                    f"task {name}: its rows went through the preconditioner {form!r}, as training rows do; expected "
                    "plain gradients: compute them with `icons gradients --task`, or give --preconditioned-tasks "
                    "(preconditioned_tasks=True) to take them as they are"
                )


def check_whole(source: StoredRows, what: str) -> None:
    """Refuses rows that are not written yet: their zeros are no gradients."""
    unwritten = int((source.stored("status", slice(None)) == Status.NOT_WRITTEN).sum())
    if unwritten:
        raise ValueError(
            f"{what}: {unwritten} of {source.partition.num_rows} rows of {getattr(source, 'path', source)} are not "
            "written yet; run the same `icons gradients` line again to finish it (of array jobs, `icons status` names "
            "those that are left)"
        )


def check_agree(left: StoredRows, right: StoredRows, fields: Sequence[str], what_left: str, what_right: str) -> None:
    """Compares two sources' manifests in the given fields, and their rows where the data must agree. A source without a
    manifest, such as an array, agrees with all.

    Raises:
        ValueError: the first field that differs, with both values.
    """
    if "data.fingerprint" in fields and left.partition.num_rows != right.partition.num_rows:
        raise ValueError(
            f"rows: {what_left} has {left.partition.num_rows}, {what_right} has {right.partition.num_rows}; they must "
            "agree: every checkpoint needs gradients of the same data"
        )
    if left.manifest and right.manifest:
        remedy = "they must agree: compute both with the same settings"
        check_compatible(left.manifest, right.manifest, fields, what_left, what_right, remedy)
