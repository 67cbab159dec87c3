"""The cross-entropy of each token, in float32, without a float32 copy of all logits."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1 << 22  # logits that exist in float32 at once: 16 MB


def token_losses(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Cross-entropy of each token, float32 (float64 logits stay float64).

    Equals `F.cross_entropy(logits.float(), targets, reduction="none")`, which keeps the logarithms of all probabilities
    in float32 for the backward pass and makes their gradient beside them: 12 bytes for every logit. Here the logits are
    kept as they came, and what is float32 is made and freed in chunks of rows: 4 bytes for a logit in bfloat16.
    """
    return TokenLoss.apply(logits, targets)  # type: ignore[no-untyped-call]


class TokenLoss(torch.autograd.Function):
    """`token_losses` with its gradient, softmax minus one-hot; probabilities are computed once more for it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        losses = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        for rows in chunks(logits):
            losses[rows] = F.cross_entropy(logits[rows].to(losses.dtype), targets[rows], reduction="none")
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (logits, targets), (gradient,) = ctx.saved_tensors, gradients
        found = torch.empty_like(logits)
        for rows in chunks(logits):
            share = gradient[rows, None]
            part = F.log_softmax(logits[rows].to(share.dtype), dim=1).exp_().mul_(share)
            found[rows] = part.scatter_add_(1, targets[rows, None], -share)
        return found, None


def chunks(logits: Float[Tensor, "tokens vocab"]) -> Iterator[slice]:
    """Pieces of at most `CHUNK` logits, or of one row."""
    height = max(1, CHUNK // logits.shape[1])
    for begin in range(0, len(logits), height):
        yield slice(begin, begin + height)
