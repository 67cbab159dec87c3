"""The positions whose logits count: the output layer sees only those that predict a supervised token.

In visual instruction data most positions are image or question, whose logits nobody reads; the output layer is a third
of a small model, and its logits are the largest tensor of any.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from icons.batch import IGNORE_INDEX
from icons.gradients.token_loss import token_losses


class SupervisedPositions:
    """Narrows one forward pass to a batch's supervised positions, and takes the losses from what it gives.

    Exact: a position's logits depend on that position's hidden state alone. A model whose output layer is not known,
    is trained itself, or is not called on `[B, L, width]` runs as it is.

    Args:
        model: Hugging Face model; `get_output_embeddings()` names its output layer.
        labels: `[B, L]`, B above 0.
    """

    def __init__(self, model: nn.Module, labels: Int[Tensor, "batch length"]) -> None:
        self.labels = labels
        self.head = output_layer(model)
        self.sample, self.position = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)

    @contextmanager
    def narrowed(self) -> Iterator[None]:
        """Inside, the output layer gets `[1, supervised, width]` in place of `[B, L, width]`."""
        if self.head is None or len(self.sample) == 0:
            yield
            return
        handle = self.head.register_forward_pre_hook(self.narrow)
        try:
            yield
        finally:
            handle.remove()

    def narrow(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != self.labels.shape:
            return None
        place = (self.sample * hidden.shape[1] + self.position).to(hidden.device)
        return (hidden.flatten(0, 1).index_select(0, place)[None], *args[1:])

    def losses(self, logits: Float[Tensor, "rows positions vocab"]) -> Float[Tensor, " batch"]:
        """The samples' losses from narrowed or whole logits, as `icons.batch.sample_losses` has them.

        Raises:
            ValueError: the logits have another number of positions.
        """
        if logits.shape[:2] == self.labels.shape:
            rows = logits[self.sample, self.position]
        elif logits.shape[:2] == (1, len(self.sample)) and self.head is not None:
            rows = logits[0]
        else:
            raise ValueError(
                f"per-sample gradients: the model's logits have shape {tuple(logits.shape)} for labels of shape "
                f"{tuple(self.labels.shape)}; expected one position per label: expand image positions in input_ids"
            )
        following = self.labels[:, 1:].to(rows.device)
        loss = token_losses(rows, following[self.sample, self.position])
        # every position is written once, so that the sum is deterministic on CUDA too (index_add is not)
        per_position = loss.new_zeros(following.shape).index_put((self.sample, self.position), loss)
        return per_position.sum(dim=1) / (following != IGNORE_INDEX).sum(dim=1).clamp(min=1)


def output_layer(model: nn.Module, trained: bool = False) -> nn.Module | None:
    """The module that makes logits, if it is known and (unless `trained`) nothing in it is trained."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module):
        return None
    return head if trained or not any(parameter.requires_grad for parameter in head.parameters()) else None
