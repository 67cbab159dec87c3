"""Covariances of what goes into linear layers and of the gradients that come out: sums for `icons.kronecker`.

A linear layer's per-sample gradient is a sum over positions of `g x^T`, with inputs x and output gradients g. Summed
over positions here: `g g^T` and `x x^T`; and over the samples the squared gradient itself. Inputs count at tokens that
stand before the last supervised one: at no padding, and at nothing that the loss does not see. Of what is not laid out
as the text is (patches in a vision tower), they count where the output's gradient is not zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from icons.batch import IGNORE_INDEX, Batch
from icons.gradients.blocks import Receiver
from icons.gradients.capture import per_sample_blocks
from icons.gradients.chance import without_chance
from icons.gradients.output_layer import SupervisedPositions, chunks
from icons.gradients.structure import Members
from icons.projection import stream

KINDS = ("left", "right", "square", "unseen")


@dataclass
class CovarianceSums:
    """Sums over rows, float64 on the CPU; they add up. Each row's loss is its own mean, as everywhere.

    Attributes:
        left: weight -> the sum of `g g^T [out, out]`, or its diagonal `[out]`.
        right: weight -> the sum of `x x^T [in, in]`, or its diagonal `[in]`.
        square: parameter -> the sum of the rows' squared gradients, over all its entries.
        unseen: parameter -> rows of which no layer has shown its inputs (biases, norms, weights on a slower path).
        rows: what was summed over.
        left_out: rows with a loss or gradient that is not finite.
    """

    left: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)
    square: dict[str, Tensor] = field(default_factory=dict)
    unseen: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    left_out: int = 0

    def add(self, other: "CovarianceSums") -> None:
        """Adds the sums over other rows.

        >>> sums = CovarianceSums(square={"w": torch.tensor(1.0)}, rows=2)
        >>> sums.add(CovarianceSums(square={"w": torch.tensor(2.0)}, rows=1))
        >>> sums.square["w"].item(), sums.rows
        (3.0, 3)
        """
        for kind in KINDS:
            total: dict[str, Tensor] = getattr(self, kind)
            for name, value in getattr(other, kind).items():
                total[name] = total[name] + value if name in total else value
        self.rows += other.rows
        self.left_out += other.left_out

    def tensors(self) -> dict[str, Tensor]:
        """All sums under names of their own, for a file."""
        named = {f"{kind}/{name}": value for kind in KINDS for name, value in getattr(self, kind).items()}
        return named | {"rows": torch.tensor([self.rows, self.left_out])}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "CovarianceSums":
        """The sums that `tensors` gave."""
        sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        for name, value in tensors.items():
            kind, slash, rest = name.partition("/")
            if slash:
                sums[kind][rest] = value
        rows, left_out = tensors["rows"].tolist()
        return cls(**sums, rows=rows, left_out=left_out)


def covariance_sums(model: nn.Module, batch: Batch, width: int = 1024) -> CovarianceSums:
    """The sums of one batch.

    They are those of the samples one by one to float32 rounding, and to the last bit those of the same batch again.
    A sample whose loss or gradient is not finite is in none of them; the batch then takes another pass.

    Args:
        model: Hugging Face causal or image-text model in eval mode.
        batch: see `icons.batch`; B = 0 is allowed.
        width: sides up to this wide have whole covariances, wider ones diagonals.

    Raises:
        ValueError: as `icons.projected_gradients`.
    """
    kept = torch.ones(len(batch["labels"]), dtype=torch.bool)
    while True:
        one = OneBatch(batch, kept, width)
        losses = per_sample_blocks(model, batch, one.begin, one.watch)
        finite = (losses.isfinite() & one.squares.sum(dim=0).isfinite()).cpu() if len(kept) else kept
        if bool((finite | ~kept).all()):
            return one.sums()
        kept = kept & finite


class OneBatch:
    """The sums of one pass, float32 on the model's device.

    Args:
        batch: see `icons.batch`.
        kept: samples that count `[B]`.
        width: see `covariance_sums`.
    """

    def __init__(self, batch: Batch, kept: Tensor, width: int) -> None:
        self.kept, self.width = kept, width
        self.reach = (_tokens_that_count(batch) & kept.to(batch["labels"].device)[:, None]).flatten()
        self.covariances: dict[tuple[str, str], Tensor] = {}
        self.rows: dict[str, Float[Tensor, " batch"]] = {}

    def begin(self, members: Members) -> Receiver:
        self.covariances, self.rows = {}, {}

        def receive(name: str, block: Tensor, rows: slice) -> None:
            self.rows[name] = block[:, None].flatten(1).float().square().sum(dim=1)

        return receive

    def watch(self, name: str, x: Tensor, gradient: Tensor, owners: Tensor, text: bool) -> None:
        """Adds a layer's positions."""
        if text:
            counted = self.reach.to(x.device)
        else:
            counted = (gradient != 0).any(dim=1) & self.kept.to(owners.device)[owners]
        for kind, values in (("left", gradient[counted]), ("right", x[counted].float())):
            product = values.T @ values if values.shape[1] <= self.width else values.square().sum(dim=0)
            known = self.covariances.get((kind, name))
            self.covariances[kind, name] = product if known is None else known + product

    @property
    def squares(self) -> Float[Tensor, "parameters batch"]:
        """Each parameter's squared gradient of each sample."""
        device = next(iter(self.rows.values())).device
        return torch.stack([value.to(device) for value in self.rows.values()])

    def sums(self) -> CovarianceSums:
        count = int(self.kept.sum())
        sums = CovarianceSums(rows=count, left_out=len(self.kept) - count)
        for (kind, name), value in self.covariances.items():
            getattr(sums, kind)[name] = value.cpu().double()
        for name, value in self.rows.items():
            sums.square[name] = value.cpu()[self.kept].double().sum()
            seen = ("left", name) in self.covariances or not bool(sums.square[name])
            sums.unseen[name] = torch.tensor(0 if seen else count)
        return sums


def _tokens_that_count(batch: Batch) -> Bool[Tensor, "batch length"]:
    """Tokens, not padding, before each row's last supervised one: a loss depends on nothing else.

    >>> labels = torch.tensor([[-100, -100, 7, 8, -100], [-100, 5, -100, -100, -100]])
    >>> _tokens_that_count({"labels": labels, "attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 2)}).int().tolist()
    [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    """
    supervised = batch["labels"] != IGNORE_INDEX
    before = supervised.flip(1).cumsum(dim=1).flip(1) - supervised.long() > 0
    mask = batch.get("attention_mask")
    return before if mask is None else before & (mask != 0)


@torch.no_grad()
def with_drawn_labels(model: nn.Module, batch: Batch, seed: int = 0) -> dict[str, Any]:
    """The batch with labels drawn from what the model predicts at each supervised position, in place of its own.

    Inputs stay as they are. Gradients of drawn labels have the Fisher matrix for their second moment; those of the
    data's own labels have the empirical one, which weighs rows by how wrong the model is on them (Kunstner, Balles,
    Hennig 2019). The numbers drawn with depend on the seed and the row alone; a probability's last bits, which are the
    batch's, matter only where one lies on a border.

    Args:
        model: Hugging Face causal or image-text model in eval mode.
        batch: see `icons.batch`.
        seed: of the drawing.

    Raises:
        ValueError: the model gives no logits, or not one position per label.
    """
    labels: Tensor = batch["labels"]
    positions = SupervisedPositions(model, labels)
    if not len(positions.sample):
        return dict(batch)
    with without_chance(model):
        logits = positions.supervised(positions.logits(model, batch))
    counts = torch.bincount(positions.sample, minlength=len(labels)).tolist()
    streams = (stream(seed, str(row), "labels") for row in batch["row"].tolist())
    drawn = np.concatenate([generator.random(count) for generator, count in zip(streams, counts, strict=True)])
    share = torch.from_numpy(drawn).to(logits.device)
    following = labels[:, 1:].clone()
    for rows in chunks(logits):
        sums = logits[rows].double().softmax(dim=1).cumsum(dim=1)
        chosen = torch.searchsorted(sums, (share[rows, None] * sums[:, -1:]).contiguous(), right=True)[:, 0]
        chosen = chosen.clamp(max=logits.shape[1] - 1)
        following[positions.sample[rows], positions.position[rows]] = chosen.to(labels)
    return dict(batch) | {"labels": torch.cat([labels[:, :1], following], dim=1)}
