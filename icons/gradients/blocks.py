"""Blocks on their way from a backward pass to its receiver: each parameter's once, whole, divided by its factors."""

from collections.abc import Callable, Iterable, Set
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

Receiver = Callable[[str, Tensor, slice], None]
"""Parameter name, its per-sample gradients [b, *shape] in float32, and which b samples of the batch these are."""


class Blocks:
    """Keeps what a receiver must not see yet.

    Args:
        receive: gets the blocks.
        size: B.
        device: of the losses.
        silent: parameters whose gradient should be zero: whether it is can be asked afterwards.

    Attributes:
        factors: `[B]`, by which losses were multiplied; None: by nothing.
        finite: `[B]`, whether all that was sent of a sample is; known where there are factors.
    """

    def __init__(self, receive: Receiver, size: int, device: torch.device, silent: Set[str]) -> None:
        self.receive, self.size, self.silent = receive, size, silent
        self.factors: Float[Tensor, " batch"] | None = None
        self.finite = torch.ones(size, dtype=torch.bool, device=device)
        self._uses: dict[str, int] = {}  # calls in the forward pass that still owe their gradient
        self._partial: dict[str, Tensor] = {}
        self._sent: set[str] = set()
        self._loud: dict[str, Tensor] = {}  # silent parameters that are not: a flag each

    def expect(self, name: str) -> None:
        """One more call of the forward pass will bring a gradient of this parameter."""
        self._uses[name] = self._uses.get(name, 0) + 1

    def expect_none(self) -> None:
        """A forward pass begins anew."""
        self._uses.clear()

    def alone(self, name: str) -> bool:
        """Whether the parameter's block is made of the call at hand alone."""
        return self._uses[name] == 1 and name not in self._partial

    def collect(self, name: str, block: Float[Tensor, " batch *shape"]) -> None:
        """What one call brings. A weight used several times in one forward pass is complete when all its uses have
        arrived."""
        block = self._partial.pop(name) + block if name in self._partial else block
        self._uses[name] -= 1
        if self._uses[name]:
            self._partial[name] = block
        else:
            self.send(name, block)

    def collect_pieces(self, name: str, pieces: Iterable[tuple[slice, Tensor]]) -> None:
        """What one call brings that is alone, some samples at a time."""
        self._uses[name] -= 1
        for rows, block in pieces:
            self.send(name, block, rows)

    def send(self, name: str, block: Float[Tensor, " rows *shape"], rows: slice | None = None) -> None:
        rows = rows or slice(0, len(block))
        self._sent.add(name)
        if self.factors is not None:
            block = block / self.factors[rows].to(block.device).view(-1, *[1] * (block.ndim - 1))
            self.finite[rows] &= block[:, None].flatten(1).isfinite().all(dim=1)
        if name in self.silent:
            # what is not finite is no sign: a broken sample's zeros are none
            self._loud[name] = block.nan_to_num(0, 0, 0).any() | self._loud.get(name, False)
        with whole_precision(block):
            self.receive(name, block, rows)

    def flush(self, names: Iterable[str]) -> list[str]:
        """Sends the sums whose last uses carry no gradient; of these names, those of which nothing came at all."""
        for name in [name for name in names if name in self._partial]:
            self.send(name, self._partial.pop(name))
        return [name for name in names if name not in self._sent]

    def loud(self) -> set[str]:
        """The silent parameters that are not."""
        if not self._loud:
            return set()
        flags = torch.stack(list(self._loud.values())).tolist()
        return {name for name, flag in zip(self._loud, flags, strict=True) if flag}


def whole_precision(value: Tensor) -> AbstractContextManager[None]:
    """Sums are float32, whatever autocast says."""
    kind = value.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
