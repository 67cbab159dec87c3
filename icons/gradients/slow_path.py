"""The slow path: one backward pass of the whole model per sample, over the graph of one forward pass."""

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icons.gradients.layers import widen


def blocks_one_by_one(
    losses: Float[Tensor, " batch"],
    factors: Float[Tensor, " batch"] | None,
    parameters: Mapping[str, nn.Parameter],
    slow: Collection[str],
) -> dict[str, Float[Tensor, " batch *shape"]]:
    """Gradients of each sample's loss, times its factor; NaN where the loss is not finite. `.grad` is None afterwards.

    Args:
        losses: of a graph that is kept.
        factors: of the losses; None: ones.
        parameters: all that may get a `.grad`.
        slow: names of those that are asked for.
    """
    blocks: dict[str, list[Tensor]] = {name: [] for name in slow}
    factors = torch.ones_like(losses) if factors is None else factors.to(losses.device)
    # samples are chosen by what is differentiated: under no_grad, as in predict, a part of `losses` has no graph
    for chosen, whole in zip(factors.diag(), losses.isfinite().tolist(), strict=True):
        if losses.requires_grad and whole:
            torch.autograd.backward(losses, chosen, retain_graph=True)
        for name, samples in blocks.items():
            parameter = parameters[name]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            samples.append(widen(gradient if whole else torch.full_like(gradient, torch.nan)))
        for parameter in parameters.values():
            parameter.grad = None
    return {name: torch.stack(samples) for name, samples in blocks.items()}


def finite(value: Tensor) -> Tensor:
    """A saved tensor without what a broken sample has left in it; an attention mask's minus infinities stay."""
    return value.nan_to_num(0, 0, -torch.inf) if value.is_floating_point() else value
