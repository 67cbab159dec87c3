"""How a layer's per-sample gradients follow from one of its calls: from its inputs and its output's gradient.

For a linear layer they are `g^T x`. For any other module (norms, embeddings, convolutions, DoRA's magnitudes, layers
with hooks or parametrisations) the module itself is differentiated once more, one sample at a time: what runs B times
is one small module, not the model. Neither is trusted before `icons.gradients.proof` has seen it agree with autograd.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from icons.gradients.ownership import FOREIGN, Layout

FEW = 32
"""Columns: a product with so few takes a CPU up to seven times as long as its transpose, which is then copied."""
TEXT = ("tokens", "flat")
"""Layouts whose entries are the positions of the text."""


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


class Division:
    """How the tensors of a call are divided among the samples.

    Attributes:
        layout: of the call.
        counts: entries of each sample.
        size: B.
    """

    def __init__(self, layout: Layout, counts: list[int]) -> None:
        self.layout, self.counts, self.size = layout, counts, len(counts)

    def linear(
        self, kind: str, x: Tensor, gradient: Tensor, rows: slice = slice(None)
    ) -> Float[Tensor, " batch *shape"]:
        """The gradients of a linear layer's weight or bias, float32; of some samples, if all have as many entries."""
        if self.layout.even:
            gradient = gradient.reshape(self.size, -1, gradient.shape[-1])[rows]
            if kind == "bias":
                return widen(gradient).sum(dim=1)
            x = x.reshape(self.size, -1, x.shape[-1])[rows]
            if half_products(gradient, x):
                return torch.bmm(gradient.mT, x, out_dtype=torch.float32)
            gradient, x = widen(gradient), widen(x)
            if x.shape[-1] <= FEW < gradient.shape[-1] and x.device.type == "cpu":
                return torch.bmm(x.mT, gradient).mT.contiguous()
            return torch.bmm(gradient.mT, x)
        parts = [
            (widen(part).flatten(0, -2), widen(given).flatten(0, -2))
            for part, given in zip(self.samples(gradient), self.samples(x), strict=True)
        ]
        return torch.stack([part.sum(dim=0) if kind == "bias" else part.mT @ given for part, given in parts])

    def entries(self, value: Tensor) -> Float[Tensor, "entries width"]:
        """A tensor's entries, those of each sample together."""
        if self.layout.axis == 0:
            return value.reshape(-1, value.shape[-1])
        return torch.cat([part.flatten(0, -2) for part in self.samples(value)])

    def owners(self, value: Tensor) -> Int[Tensor, " entries"]:
        """Whose each of `entries` is."""
        each = value.shape[:-1].numel() // max(1, sum(self.counts))
        counts = torch.tensor(self.counts, device=value.device) * each
        return torch.arange(self.size, device=value.device).repeat_interleave(counts)

    def samples(self, value: Tensor) -> Sequence[Tensor]:
        """Each sample's piece of a tensor."""
        return value.split(self.counts, dim=self.layout.axis)

    def lengths(self, value: Tensor) -> Float[Tensor, " batch"]:
        """The L2 norm of each sample's piece; of whole numbers, as of ids, as if they were ones."""
        numbers = widen(value) if value.is_floating_point() else torch.ones_like(value, dtype=torch.float32)
        return torch.stack([part.norm() for part in self.samples(numbers)])


class Call:
    """One call of a module, taken apart, so that it can be made again for each sample.

    Args:
        module: what was called.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.module = module
        self.leaves: list[Any]
        self.spec: TreeSpec
        self.leaves, self.spec = tree_flatten((args, dict(kwargs)))
        self.numbers = [number for number, leaf in enumerate(self.leaves) if _holds_samples(leaf)]

    def let_go(self) -> list[Tensor]:
        """The tensors that may hold samples; from then on the tap keeps them, so that checkpointing can drop them."""
        tensors = [self.leaves[number] for number in self.numbers]
        for number in self.numbers:
            self.leaves[number] = None
        return tensors

    def again(
        self,
        parameters: Mapping[str, nn.Parameter],
        division: Division,
        kept: Sequence[Tensor],
        gradient: Tensor,
    ) -> dict[str, Float[Tensor, " batch *shape"]]:
        """The gradients of any parameters inside the module, float32, by running it once more for each sample.

        Args:
            parameters: by their names in the module.
            division: of the call.
            kept: what was let go.
            gradient: of the output.
        """
        free = {kind: parameter.detach().requires_grad_() for kind, parameter in parameters.items()}
        blocks = {
            kind: value.new_empty(division.size, *value.shape, dtype=_wide(value.dtype)) for kind, value in free.items()
        }
        axis, ends = division.layout.axis, accumulate(division.counts)
        for sample, (end, count) in enumerate(zip(ends, division.counts, strict=True)):
            gradients: Sequence[Tensor | None] = [None] * len(free)
            if count:
                leaves = list(self.leaves)
                for number, tensor, split in zip(self.numbers, kept, division.layout.split, strict=True):
                    leaves[number] = tensor.detach().narrow(axis, end - count, count) if split else tensor.detach()
                args, kwargs = tree_unflatten(leaves, self.spec)
                with torch.enable_grad():
                    output = functional_call(self.module, free, args, kwargs)
                if output.requires_grad:
                    part = gradient.narrow(axis, end - count, count)
                    gradients = torch.autograd.grad(output, list(free.values()), part, allow_unused=True)
            for kind, value in zip(free, gradients, strict=True):
                blocks[kind][sample] = 0 if value is None else value
        return blocks


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """A linear layer's input, alone in a list; an empty one if it got none."""
    return next(([value] for value in (*args, *kwargs.values()) if _holds_samples(value)), [])


def _holds_samples(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def divided(tensors: Sequence[Tensor], output: Any, shape: tuple[int, int]) -> Division:
    """How a call is divided whose first tensor is laid out as the text is, `shape` (B, L), if it is."""
    kind = _sample_layout(tensors[0], output, shape) if tensors else None
    if kind is None:
        return Division(FOREIGN, [0] * shape[0])
    length = len(tensors[0])
    split = tuple(tensor.ndim > 0 and len(tensor) == length for tensor in tensors)
    return _text_division(kind, split, length // shape[0], shape[0])


@lru_cache(maxsize=256)  # the layers of a model have few between them
def _text_division(kind: str, split: tuple[bool, ...], count: int, size: int) -> Division:
    return Division(Layout(kind, split), [count] * size)


def _sample_layout(x: Tensor, output: Any, shape: tuple[int, int]) -> str | None:
    """How a layer's input seems to hold the samples: `[B, L, ...]`, `[B * L, ...]`, `[B, ...]`, or not at all.

    >>> x = torch.zeros(6, 4)
    >>> _sample_layout(x, x, (2, 3)), _sample_layout(x[:5], x[:5], (2, 3)), _sample_layout(x[:2], x[:2], (2, 3))
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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for sums, whatever the weights are; float64 stays."""
    return dtype if dtype == torch.float64 else torch.float32


def widen(value: Tensor) -> Tensor:
    return value.to(_wide(value.dtype))


def half_products(one: Tensor, two: Tensor) -> bool:
    """Whether a GPU multiplies these as they are and adds up in float32: a product of two such numbers is one."""
    half = one.dtype == two.dtype and one.dtype in (torch.float16, torch.bfloat16)
    return half and one.device.type == "cuda" and _adds_up_wide()


@cache
def _adds_up_wide() -> bool:
    return "out_dtype" in (torch.bmm.__doc__ or "")


class Widened:
    """The last tensor that was widened: layers beside each other, as those of queries, keys and values, share their
    input."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None

    def of(self, value: Tensor) -> Tensor:
        """`value` in float32 (float64 stays)."""
        if value.dtype == _wide(value.dtype):
            return value
        if self.last is None or self.last[0] is not value:
            self.last = None  # before the next is made
            self.last = value, widen(value)
        return self.last[1]
