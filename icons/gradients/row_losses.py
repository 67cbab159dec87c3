"""Losses of a batch's rows, token by token, and whether two passes over them agree."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icons.batch import Batch, supervised_tokens
from icons.gradients.noise import is_half, shaken
from icons.gradients.output_layer import SupervisedPositions

_DRAWS, _SAMPLES = 3, 8  # passes and losses that the noise of half precision is measured by, at least
_DEVIATIONS = 6  # of that noise: what another order of the same sums may do
_MOST = 0.05  # of a loss: more is no noise
_SAME = 2e-5  # of a loss, float32


def _ratio(tokens: int) -> float:
    """Of the noise, how much the losses of so many tokens may be apart."""
    return 3 + 6 / tokens**0.5


@dataclass(frozen=True)
class RowLosses:
    """Of each row, its supervised tokens' losses `[tokens]`."""

    rows: Sequence[Tensor]

    @classmethod
    def of(cls, tokens: Float[Tensor, " tokens"], batch: Batch) -> "RowLosses":
        return cls(tokens.split(supervised_tokens(batch["labels"]).tolist()))

    @classmethod
    def by(cls, model: nn.Module, batch: Batch, narrow: bool = False) -> "RowLosses":
        """From a pass."""
        positions = SupervisedPositions(model, batch["labels"], narrow)
        return cls.of(positions.of_tokens(positions.logits(model, batch)), batch)

    @classmethod
    @torch.no_grad()
    def or_none(cls, model: nn.Module, batch: Batch | None, narrow: bool = False) -> "RowLosses | None":
        """None where the batch could not be changed, or where the model does not take it so."""
        if batch is None:
            return None
        try:
            return cls.by(model, batch, narrow)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None

    def __getitem__(self, rows: Iterable[int]) -> "RowLosses":
        return RowLosses([self.rows[row] for row in rows])

    def means(self) -> Float[Tensor, " rows"]:
        return torch.stack([row.sum() / max(1, len(row)) for row in self.rows])


@dataclass(frozen=True)
class LossNoise:
    """How far losses move when each result of each layer in half precision moves by up to a unit in its last place: as
    much as any order of its sums can do, and for all of its numbers at once. Infinite where no layer gives such a
    result, as where a model computes by functions alone: nothing is known of its noise.

    Attributes:
        mean: standard deviation of the sample's loss that moves most.
        squares: `[B]`, of each sample's tokens the mean square.
    """

    mean: float
    squares: Float[Tensor, " batch"]

    @classmethod
    def of(cls, model: nn.Module, batch: Batch) -> "LossNoise":
        plain = RowLosses.by(model, batch, narrow=True)
        generator = torch.Generator(plain.rows[0].device).manual_seed(0)
        means: list[Tensor] = []
        squares: list[Tensor] = []
        with shaken(model, generator) as modules:
            while len(means) < _DRAWS or len(means) * len(plain.rows) < _SAMPLES:
                moved = RowLosses.by(model, batch, narrow=True)
                means.append((moved.means() - plain.means()).square())
                apart = zip(moved.rows, plain.rows, strict=True)
                squares.append(RowLosses([(one - two).square() for one, two in apart]).means())
        most = float("inf") if not modules else float(torch.stack(means).nan_to_num(0, 0).mean(dim=0).max().sqrt())
        return cls(most, torch.stack(squares).nan_to_num(0, 0).mean(dim=0) if modules else plain.means() + torch.inf)


class LossComparison:
    """Compares losses of one batch's rows from several passes.

    Args:
        model: which gave them.
        batch: whose rows they are, in its order or another.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.noise: LossNoise | None = None  # measured when it is first asked for

    @torch.no_grad()
    def differ(self, one: RowLosses, two: RowLosses, rows: Sequence[int]) -> bool:
        """Whether losses differ by more than another order of the same sums explains: in float32 by 1e-4 of the loss;
        in half precision by more than the noise that the model turns its rounding into, which is measured: in the mean
        of a sample's tokens, where it may all point one way, and in their spread, where it cannot."""
        first, second = one.means(), two.means()
        size, both = first.abs().clamp(min=0.1), first.isfinite() & second.isfinite()
        beyond = ((first - second).abs() > 1e-4 * size) & both
        if not bool(beyond.any()) or not is_half(self.model, first.device):
            return bool(beyond.any())
        if self.noise is None:
            self.noise = LossNoise.of(self.model, self.batch)
        allowed = (_DEVIATIONS * self.noise.mean + 1e-4 * size).minimum(_MOST * size)
        if bool(((first - second).abs() > allowed)[both].any()):
            return True
        apart = torch.cat([(a - b).square() for a, b in zip(one.rows, two.rows, strict=True)]).nan_to_num(0, 0)
        usual = torch.cat([self.noise.squares[row].expand(len(one.rows[n])) for n, row in enumerate(rows)])
        return bool(apart.sum() > _ratio(len(apart)) ** 2 * usual.sum())

    def alike(self, one: RowLosses, two: RowLosses, rows: Sequence[int]) -> bool:
        """Whether losses with a mask and without agree, and are not finite in the same rows. In float32 token by token,
        to a few times what another order of the same sums does: to mask is always right, and not to is quicker."""
        first, second = one.means(), two.means()
        if not torch.equal(first.isfinite(), second.isfinite()) or self.differ(one, two, rows):
            return False
        if is_half(self.model, first.device):
            return True
        apart = RowLosses([(a - b).square() for a, b in zip(one.rows, two.rows, strict=True)]).means().sqrt()
        return not bool((apart > _SAME * first.abs().clamp(min=0.1)).any())
