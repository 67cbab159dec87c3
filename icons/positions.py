"""The positions whose logits count: the output layer sees only those where some row of the batch predicts a token.

In visual instruction data most positions are image or question, whose logits nobody reads; the output layer is a third
of a small model, and its logits are the largest tensor of any.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from icons.batch import IGNORE_INDEX, sample_losses


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
        predicting = (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]
        # the last position predicts nothing; it stands at the end, as in every batch
        self.kept = torch.cat([predicting, predicting.new_tensor([labels.shape[1] - 1])])

    @contextmanager
    def narrowed(self) -> Iterator[None]:
        """Inside, the output layer gets `[B, kept, width]` in place of `[B, L, width]`."""
        if self.head is None or len(self.kept) >= self.labels.shape[1]:
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
        return (hidden.index_select(1, self.kept.to(hidden.device)), *args[1:])

    def losses(self, logits: Float[Tensor, "batch positions vocab"]) -> Float[Tensor, " batch"]:
        """The samples' losses from narrowed or whole logits.

        Raises:
            ValueError: the logits have another number of positions.
        """
        if logits.shape[:2] == self.labels.shape:
            return sample_losses(logits, self.labels)
        if logits.shape[:2] != (len(self.labels), len(self.kept)) or self.head is None:
            raise ValueError(
                f"per-sample gradients: the model's logits have shape {tuple(logits.shape)} for labels of shape "
                f"{tuple(self.labels.shape)}; expected one position per label: expand image positions in input_ids"
            )
        # sample_losses shifts: the label of kept position k is looked for at k + 1
        following = self.labels[:, self.kept[:-1] + 1]
        first = following.new_full((len(following), 1), IGNORE_INDEX)
        return sample_losses(logits, torch.cat([first, following], dim=1))


def output_layer(model: nn.Module, trained: bool = False) -> nn.Module | None:
    """The module that makes logits, if it is known and (unless `trained`) nothing in it is trained."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module):
        return None
    return head if trained or not any(parameter.requires_grad for parameter in head.parameters()) else None
