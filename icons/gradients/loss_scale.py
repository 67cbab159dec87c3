"""Loss scaling for float16, where small gradients would vanish: exact, since every factor is a power of two."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from icons.batch import Batch, supervised_tokens
from icons.gradients.structure import Members

_FIRST, _LEAST, _STEP = 10, -14, 6  # exponents: of the first try's gradient of a logit, of the last try's, between two


def needs_scale(members: Members) -> bool:
    """Whether anything in the pass is float16: weights, or what autocast makes."""
    dtypes = members.structure.dtypes
    if any(dtype == torch.float16 for dtype, _ in dtypes):
        return True
    kinds = {kind for _, kind in dtypes}
    return any(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16 for kind in kinds)


class LossScale:
    """A power of two for each sample, so that the largest gradients of its logits are near 2^_FIRST.

    They are `(probability - target) / tokens`, which is about `loss / tokens` where the loss is small. A sample that
    overflows is tried again with less. Its factor follows from itself alone, never from samples before it.

    Args:
        labels: `[B, L]`.
    """

    @classmethod
    def of(cls, batch: Batch, members: Members) -> "LossScale | None":
        """The scale of a batch's losses; None if nothing in the pass is float16."""
        return cls(batch["labels"]) if needs_scale(members) else None

    def __init__(self, labels: Tensor) -> None:
        self.tokens = supervised_tokens(labels).clamp(min=1)
        self.exponent = torch.full((len(labels),), _FIRST, device=labels.device)

    def factors(self, losses: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        wanted = self.tokens.to(losses.device) / losses.detach().float().clamp(1e-6, 1)
        exponent = wanted.nan_to_num(1.0).log2().round() + self.exponent.to(losses.device)
        return torch.exp2(exponent.float().clamp(-100, 100))

    def lower(self, overflowed: Bool[Tensor, " batch"]) -> bool:
        """Takes less for these samples; False if none of them can go lower."""
        lowered = overflowed.to(self.exponent.device) & (self.exponent > _LEAST)
        self.exponent = torch.where(lowered, self.exponent - _STEP, self.exponent)
        return bool(lowered.any())
