"""The tap: shows a layer's input and its output's gradient, and keeps no more of the input than it must."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Tap(torch.autograd.Function):
    """The identity; its backward pass shows the saved tensors and the output's gradient to `see`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, see: Callable[[Sequence[Tensor], Tensor], None], *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)  # not a closure: so that checkpointing can drop and recompute them
        ctx.see = see
        return output.detach()  # not a view, which the model might not change in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # once: a checkpoint gives them once
        ctx.see(kept, gradients[0])
        return gradients[0], None, *(None for _ in kept)


class NarrowInputs:
    """Inputs as they were before an adapter widened them to its own dtype.

    PEFT casts a bfloat16 layer's input to the float32 of its adapter, once for q, k, v each, gate and up: kept for the
    backward pass, these copies would be more than a third of all activations. The layer's own input, which the copies
    share, has the same values in half the bytes. That they are the same is checked, for each layer, in the first pass.

    Args:
        owners: of each tapped layer, its name and the module around it.
        equal: by name, whether a layer was found to get nothing but its owner's input; learnt while `checking`.
    """

    def __init__(self, owners: Mapping[nn.Module, tuple[str, nn.Module]], equal: dict[str, bool]) -> None:
        self.owners, self.equal, self.checking = owners, equal, False
        self.given: tuple[nn.Module, Tensor] | None = None  # one alone: no tensor lives longer for it

    def hooks(self) -> list[Any]:
        """Registers what remembers the inputs of owners that may share one with a layer; the handles."""
        wanted = {owner for name, owner in self.owners.values() if self.checking or self.equal.get(name, False)}
        return [owner.register_forward_pre_hook(self.remember) for owner in wanted]

    def remember(self, owner: nn.Module, args: tuple[Any, ...]) -> None:
        self.given = (owner, args[0]) if args and isinstance(args[0], Tensor) else None

    def forget(self) -> None:
        """To be called after every pass: the tensor's graph holds the pass, which holds the tensor, and no collector of
        garbage sees through a graph. All activations would stay for good."""
        self.given = None

    def of(self, module: nn.Module, x: Tensor) -> Tensor:
        """What to keep of `module`'s input: `x`, or the narrower tensor of the same values."""
        if self.given is None:
            return x
        (name, owner), (given, narrow) = self.owners[module], self.given
        if given is not owner:
            return x
        if narrow.shape != x.shape or not narrow.is_floating_point() or narrow.element_size() >= x.element_size():
            return x
        if self.checking:
            same = torch.allclose(narrow.to(x.dtype), x, rtol=0, atol=0, equal_nan=True)
            self.equal[name] = same and self.equal.get(name, True)
        return narrow if self.equal.get(name, False) else x
