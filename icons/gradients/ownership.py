"""Whose the entries of a tower's tensors are: from images, tiles and patches to rows.

Each row's entries stand together, rows in order. How many a row has is not seen from a tensor, but from the batch: by
its counts (`entries_per_row`), by its images that are not padding, by its image tokens. Any of these may be the right
one for a module, or none; `icons.gradients.proof` decides.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from icons.batch import Batch

ROWS = "rows"
_TOKEN_IDS = ("image_token_id", "image_token_index")


@dataclass(frozen=True)
class Layout:
    """How a call's tensors hold the samples: what a proof is good for.

    Attributes:
        kind: `tokens`, `flat`, `first` (see `icons.gradients.layers`), `foreign`, or the name of a map.
        split: of the call's tensors, whether each is divided among the samples.
        axis: along which they are.
        ratio: entries for each one that the map counts.
        agreeing: maps that give the same numbers in this batch, `kind` among them.
        even: whether every row has the same number.
    """

    kind: str
    split: tuple[bool, ...] = ()
    axis: int = 0
    ratio: Fraction = Fraction(1)
    agreeing: frozenset[str] = frozenset()
    even: bool = True

    def __hash__(self) -> int:
        return hash((self.kind, self.axis))  # asked for in every call of a layer: fractions and sets take their time

    def covers(self, other: "Layout") -> bool:
        """Whether what holds for this one holds for `other`: the same map, where no further one tells against it, and
        rows that differ tell more than rows that are alike."""
        same = (self.kind, self.split, self.axis, self.ratio) == (other.kind, other.split, other.axis, other.ratio)
        return same and self.agreeing <= other.agreeing and (other.even or not self.even)


FOREIGN = Layout("foreign")  # nothing in the call looks laid out by samples


class Ownership:
    """The maps of one batch.

    Args:
        model: whose config tells the id at image positions.
        batch: see `icons.batch`.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch, self.size = model, batch, len(batch["labels"])

    @cached_property
    def counts(self) -> dict[str, list[int]]:
        """By name, what each row has of something; a map is one of these times a constant."""
        given = {name: value.tolist() for name, value in self.batch.get("entries_per_row", {}).items()}
        counts: dict[str, list[int]] = {}
        for name, value in self.batch.items():
            if isinstance(value, Tensor) and value.ndim > 4 and value.is_floating_point():
                # [images, tiles, ...] or [rows, images, ...]: fewer ones are filled up with zeros
                used = (value != 0).flatten(2).any(dim=2).sum(dim=1).int().tolist()
                owners = given.get(name, [1] * self.size)
                if sum(owners) == len(used):
                    counts[f"{name} in use"] = [sum(part) for part in _parted(used, owners)]
        counts |= given
        if (tokens := self.image_tokens()) is not None:
            counts["image tokens"] = tokens
        counts[ROWS] = [1] * self.size
        return {name: numbers for name, numbers in counts.items() if len(numbers) == self.size and any(numbers)}

    def image_tokens(self) -> list[int] | None:
        ids, config = self.batch.get("input_ids"), getattr(self.model, "config", None)
        marks = [getattr(config, name, None) for name in _TOKEN_IDS] + [getattr(self.model, "image_token", None)]
        known = {mark for mark in marks if isinstance(mark, int)}
        if ids is None or not known:
            return None
        marked = torch.isin(ids, torch.tensor(sorted(known), device=ids.device))
        return [int(count) for count in marked.sum(dim=1).tolist()]

    def maps(self, length: int) -> dict[str, list[int]]:
        """The maps that can divide `length` entries, those without a factor first."""
        maps = {}
        for name, counts in self.counts.items():
            ratio = Fraction(length, sum(counts))
            if all((count * ratio).denominator == 1 for count in counts):
                maps[name] = [int(count * ratio) for count in counts]
        return dict(sorted(maps.items(), key=lambda item: sum(self.counts[item[0]]) != length))

    def share(self, tensors: Sequence[Tensor], output: Any, refused: Set[str]) -> tuple[Layout, list[int]]:
        """How a call's tensors, of which the first is its input, are divided; entries of each row.

        Args:
            tensors: of the call.
            output: what it gave.
            refused: maps that were found wrong.
        """
        if not tensors or not isinstance(output, Tensor) or not output.is_floating_point():
            return FOREIGN, [0] * self.size
        x = tensors[0]
        for axis in (0, 1) if x.ndim > 2 and len(x) == 1 else (0,):
            if x.ndim <= axis or output.ndim <= axis or output.shape[axis] != x.shape[axis]:
                continue
            length = x.shape[axis]
            maps = {name: numbers for name, numbers in self.maps(length).items() if name not in refused}
            if maps:
                kind, numbers = next(iter(maps.items()))
                agreeing = frozenset(name for name, other in maps.items() if other == numbers)
                split = tuple(tensor.ndim > axis and tensor.shape[axis] == length for tensor in tensors)
                ratio = Fraction(length, sum(self.counts[kind]))
                return Layout(kind, split, axis, ratio, agreeing, len(set(numbers)) == 1), numbers
        return FOREIGN, [0] * self.size


def _parted(values: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """Consecutive pieces of the given sizes.

    >>> list(_parted([1, 2, 3], [2, 0, 1]))
    [[1, 2], [], [3]]
    """
    begin = 0
    for size in sizes:
        yield values[begin : begin + size]
        begin += size
