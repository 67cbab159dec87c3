"""The rows of one batch, put together block by block: preconditioned, projected, and their norms taken."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from icons.gradients.fused_fold import FusedFold
from icons.gradients.sums import SquaredNorms, samples_at_a_time
from icons.preconditioner import AdamPreconditioner, Preconditioner, Sign
from icons.projection import CountSketch, Projector


class ProjectedRows:
    """What `receive` was given of each parameter, added up.

    Args:
        size: samples of the batch.
        shapes: of all parameters, by name.
        device: of the blocks.
        projector: see `icons.gradients.projected_gradients`.
        preconditioner: likewise.

    Attributes:
        total: `[size, K]` float32.
        fused: does all of it in one pass over a block; None: step by step.
    """

    def __init__(
        self,
        size: int,
        shapes: Mapping[str, torch.Size],
        device: torch.device,
        projector: Projector,
        preconditioner: Preconditioner | None,
    ) -> None:
        self.projector, self.preconditioner = projector, preconditioner
        self.total = projector.start(size, shapes, device)
        self.in_pieces = by_entry(projector, preconditioner)
        self._squares = SquaredNorms(size, shapes, device)
        self.fused = FusedFold.of(projector, preconditioner, device, self._add)

    def receive(self, name: str, block: Float[Tensor, " b *shape"], rows: slice) -> None:
        """Of one parameter and some samples; overwrites `block`."""
        block = block.float()
        if self.fused is not None:
            self.fused.add(self.total[rows], self._squares.norms_of(name, rows), name, block)
            return
        pieces = [slice(0, len(block))]
        if self.in_pieces:
            pieces = samples_at_a_time(len(block), block.shape[1:].numel(), block.device)
        for piece in pieces:
            part, here = self._steps(name, block[piece]), slice(rows.start + piece.start, rows.start + piece.stop)
            self._squares.put(name, part, here)
            self.projector.add(self.total[here], name, part)

    def norm(self) -> Float[Tensor, " batch"]:
        """Of each sample, of all that was projected."""
        return self._squares.norm()

    def _steps(self, name: str, block: Tensor) -> Tensor:
        sign = self.projector.sign(name, block.shape[1:], block.device)
        if self.preconditioner is not None:
            return self.preconditioner.apply(name, block, sign)
        return block if sign is None else block.mul_(sign)

    def _add(self, total: Tensor, norms: Tensor, name: str, block: Tensor) -> None:
        part = self._steps(name, block)
        torch.linalg.vector_norm(part[:, None].flatten(1), dim=1, out=norms)
        self.projector.add(total, name, part)


def by_entry(projector: Projector, preconditioner: Preconditioner | None) -> bool:
    """Whether samples of a block may come in pieces with no bit changed. A dense matrix is made anew for each call, and
    a matrix product of one sample could have other last bits; what is derived from these classes may count on whole
    blocks."""
    known = type(projector) is CountSketch and type(preconditioner) in (AdamPreconditioner, Sign, type(None))
    return known and not getattr(preconditioner, "compiled", False)
