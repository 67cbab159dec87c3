"""A row's gradient alone, without padding and company: in its batch it must be the same.

A loss may hardly depend on the rows beside it, and its gradient all the same, as of an adapter that mixes its experts
by the mean over all positions of a batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from icons.batch import Batch
from icons.gradients.altered_batches import rows_of, without_padding
from icons.gradients.blocks import Receiver
from icons.gradients.loss_scale import LossScale
from icons.gradients.noise import is_half, shaken
from icons.gradients.output_layer import SupervisedPositions
from icons.gradients.overflow import fitted
from icons.gradients.structure import Members

_APART = 0.01  # of a row's gradient, in float32
_ROUNDING = 1e-6  # of the gradient of a logit, which a small loss leaves little of
_TIMES = 2  # the noise of half precision, which is measured: the most of so many draws, in some of which a token may
_DRAWS = 6  # take another expert


class LoneRow:
    """One row of a batch, of which `begin` compares the blocks with its gradient alone.

    Args:
        model: any.
        members: of the model.
        batch: the row alone.
        row: which it is in its batch.
    """

    def __init__(self, model: nn.Module, members: Members, batch: Batch, row: int) -> None:
        self.model, self.members, self.batch, self.row = model, members, batch, row
        self.loss = 0.0
        self.gradients = self._gradients()
        self.apart: dict[str, Tensor] = {}  # |block - gradient|, |gradient|

    @classmethod
    def of(cls, model: nn.Module, members: Members, batch: Batch, row: int) -> "LoneRow | None":
        """The row; None where it cannot be told from the batch, or the model does not take it so, or it is alone."""
        labels, one = batch["labels"], rows_of(batch, [row])
        mask = batch.get("attention_mask", torch.ones_like(labels))
        if one is None or mask.shape != labels.shape or (len(labels) == 1 and bool((mask != 0).all())):
            return None
        try:
            return cls(model, members, without_padding(one) if "attention_mask" in batch else one, row)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model says to a row without its images
            return None

    def begin(self, begin: Callable[[Members], Receiver]) -> Callable[[Members], Receiver]:
        def watched(members: Members) -> Receiver:
            receive = begin(members)
            self.apart.clear()

            def look(name: str, block: Tensor, rows: slice) -> None:
                if rows.start <= self.row < rows.stop:
                    mine, alone = block[self.row - rows.start].float(), self.gradients[name].float()
                    self.apart[name] = torch.stack([(mine - alone).norm(), alone.norm()])
                receive(name, block, rows)

            return look

        return watched

    def compare(self) -> None:
        """To be called when the receiver has all blocks.

        Raises:
            ValueError: the row's gradient is another.
        """
        device = self.members.device
        apart, size = torch.stack([value.to(device) for value in self.apart.values()]).norm(dim=0).tolist()
        allowed = (_APART + _ROUNDING / max(self.loss, _ROUNDING)) * size
        if not apart > allowed or apart == float("inf"):  # what is not finite is reported as such
            return
        if is_half(self.model, device) and not apart > _TIMES * self._noise() + allowed:
            return
        raise ValueError(
            f"per-sample gradients: in {type(self.model).__name__} a sample's gradient depends on its padding or the "
            f"samples beside it: that of row {self.row} in its batch is {apart / max(size, 1e-30):.1%} off what it is "
            "alone; expected the same: an adapter and layers that see one sample at a time, or batches of one row"
        )

    def _noise(self) -> float:
        """How far the gradient moves when results in half precision do; infinite where none can be moved."""
        generator = torch.Generator(self.members.device).manual_seed(0)
        most = 0.0
        with shaken(self.model, generator) as modules:
            for _ in range(_DRAWS):
                again = self._gradients()
                apart = [(again[name].float() - one.float()).norm() for name, one in self.gradients.items()]
                most = max(most, float(torch.stack([value.to(self.members.device) for value in apart]).norm()))
        return most if modules else float("inf")

    def _gradients(self) -> dict[str, Tensor]:
        return fitted(self.members.device, self._pass)

    @torch.enable_grad()
    def _pass(self) -> dict[str, Tensor]:
        trained = self.members.trainable
        former = {name: parameter.grad for name, parameter in trained.items()}
        try:
            for parameter in trained.values():
                parameter.grad = None
            losses = SupervisedPositions(self.model, self.batch["labels"], narrow=False).run(self.model, self.batch)
            self.loss = float(losses.detach())
            scale = LossScale.of(self.batch, self.members)
            factors = torch.ones_like(losses) if scale is None else scale.factors(losses)
            if losses.requires_grad:
                losses.backward(factors)
            nothing = torch.zeros(())
            return {
                name: nothing.to(parameter.device).expand(parameter.shape)
                if parameter.grad is None
                else (parameter.grad if scale is None else parameter.grad.float() / float(factors))
                for name, parameter in trained.items()
            }
        finally:
            for name, parameter in trained.items():
                parameter.grad = former[name]
