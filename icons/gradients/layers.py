"""How a layer's per-sample gradients follow from one of its calls: from its inputs and its output's gradient.

For a linear layer they are `g^T x`. For any other module (norms, embeddings, convolutions, DoRA's magnitudes, layers
with hooks or parametrisations) the module itself is differentiated once more, one sample at a time: what runs B times
is one small module, not the model. Neither is trusted before `icons.gradients.proof` has seen it agree with autograd.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Layout = tuple[Any, ...]  # how a call's tensors hold the samples: what a proof is good for
FOREIGN: Layout = ("foreign",)  # nothing in the call looks laid out by samples


@dataclass(frozen=True)
class Part:
    """A parameter as a module has it.

    Attributes:
        kind: its name in the module; dotted if it lies in a module inside.
        name: its name in the model.
        linear: served by `g^T x`.
    """

    kind: str
    name: str
    linear: bool


class Call:
    """One call of a module, taken apart: tensors that hold samples, tensors that do not, and the rest.

    Args:
        module: what was called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: what it gave.
        shape: (B, L) of the batch.
    """

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, shape: tuple[int, int]
    ) -> None:
        self.module, self.size = module, shape[0]
        self.leaves: list[Any]
        self.spec: TreeSpec
        self.leaves, self.spec = tree_flatten((args, dict(kwargs)))
        self.places = [
            place
            for place, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)
        ]
        self.tensors: list[Tensor] = [self.leaves[place] for place in self.places]
        kind = None if not self.tensors else sample_layout(self.tensors[0], output, shape)
        length = len(self.tensors[0]) if kind else 0
        self.split = tuple(tensor.ndim > 0 and len(tensor) == length for tensor in self.tensors) if kind else ()
        self.layout: Layout = FOREIGN if kind is None else (kind, self.split)
        self.step = length // self.size  # how many entries of the first dimension are one sample's

    def linear(self, kind: str, x: Tensor, gradient: Tensor) -> Float[Tensor, "batch *shape"]:
        """The gradients of a linear layer's weight or bias, float32."""
        gradient = widen(gradient.reshape(self.size, -1, gradient.shape[-1]))
        if kind == "bias":
            return gradient.sum(dim=1)
        return torch.bmm(gradient.mT, widen(x.reshape(self.size, -1, x.shape[-1])))

    def again(
        self, parameters: Mapping[str, nn.Parameter], kept: Sequence[Tensor], gradient: Tensor
    ) -> dict[str, Float[Tensor, "batch *shape"]]:
        """The gradients of any parameters inside the module, float32, by running it once more for each sample."""
        free = {kind: parameter.detach().requires_grad_() for kind, parameter in parameters.items()}
        blocks = {
            kind: value.new_empty(self.size, *value.shape, dtype=wide(value.dtype)) for kind, value in free.items()
        }
        for sample in range(self.size):
            rows = slice(sample * self.step, (sample + 1) * self.step)
            leaves = list(self.leaves)
            for place, tensor, split in zip(self.places, kept, self.split, strict=True):
                leaves[place] = tensor.detach()[rows] if split else tensor.detach()
            args, kwargs = tree_unflatten(leaves, self.spec)
            with torch.enable_grad():
                output = functional_call(self.module, free, args, kwargs)
            found: Sequence[Tensor | None] = [None] * len(free)
            if output.requires_grad:
                found = torch.autograd.grad(output, list(free.values()), gradient[rows], allow_unused=True)
            for kind, value in zip(free, found, strict=True):
                blocks[kind][sample] = 0 if value is None else value
        return blocks

    def forget(self) -> None:
        """Lets go of the tensors: the tap keeps what it needs, so that checkpointing can drop it."""
        for place in self.places:
            self.leaves[place] = None
        self.tensors = []


def sample_layout(x: Tensor, output: Any, shape: tuple[int, int]) -> str | None:
    """How a layer's input seems to hold the samples: `[B, L, ...]`, `[B * L, ...]`, `[B, ...]`, or not at all.

    >>> x = torch.zeros(6, 4)
    >>> sample_layout(x, x, (2, 3)), sample_layout(x[:5], x[:5], (2, 3)), sample_layout(x[:2], x[:2], (2, 3))
    ('flat', None, None)
    """
    batch, length = shape
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.shape[:1] != x.shape[:1]:
        return None
    if x.shape[:2] == (batch, length):
        return "tokens"
    if x.shape[:1] == (batch * length,):
        return "flat"
    # [B, width] alone could be any B things, as tokens that a router has sent here
    return "first" if x.ndim > 2 and len(x) == batch else None


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for sums, whatever the weights are; float64 stays."""
    return dtype if dtype == torch.float64 else torch.float32


def widen(value: Tensor) -> Tensor:
    return value.to(wide(value.dtype))
