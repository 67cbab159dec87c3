"""From the output layer to the losses: supervised positions alone, and each token's cross-entropy.

In visual instruction data most positions are image or question, whose logits nobody reads; the output layer is a third
of a small model, and its logits are the largest tensor of any.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from icons.batch import IGNORE_INDEX, Batch, id_bounds, model_inputs, refuse_strange_labels
from icons.gradients.tokens import tokens_alone

CHUNK = 1 << 22  # logits that exist in float32 at once: 16 MB


class SupervisedPositions:
    """Narrows one forward pass to a batch's supervised positions, and takes the losses from what it gives.

    Exact: a position's logits depend on that position's hidden state alone. A model whose output layer is not known,
    is trained itself, or is not called on `[B, L, width]` runs as it is.

    Args:
        model: Hugging Face model; `get_output_embeddings()` names its output layer.
        labels: `[B, L]`, B above 0.
        narrow: False runs any model as it is.
    """

    def __init__(self, model: nn.Module, labels: Int[Tensor, "batch length"], narrow: bool = True) -> None:
        self.labels = labels
        self.model_class = type(model).__name__
        self.head = output_layer(model) if narrow else None
        self.sample, self.position = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        self.targets = labels[:, 1:][self.sample, self.position].long()
        self.bounds = id_bounds(self.targets)  # before the forward pass, which a GPU need not have done for it

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
        index = (self.sample * hidden.shape[1] + self.position).to(hidden.device)
        return (hidden.flatten(0, 1).index_select(0, index)[None], *args[1:])

    def run(self, model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """The samples' losses, from one forward pass.

        Raises:
            ValueError: the model gives no logits, or not one position per label; or an id is no token.
        """
        return self.losses(self.logits(model, batch))

    def logits(self, model: nn.Module, batch: Batch) -> Float[Tensor, "rows positions vocab"]:
        """Narrowed or whole logits, from one forward pass.

        Raises:
            ValueError: the model gives none.
        """
        with self.narrowed(), tokens_alone(model):
            output = model(**{"use_cache": False} | model_inputs(batch))
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise ValueError(
                f"per-sample gradients: {self.model_class} gave {type(output).__name__} without logits [batch, length, "
                "vocabulary]; expected a causal or image-text model with its output layer, and return_dict left True"
            )
        return logits

    def supervised(self, logits: Float[Tensor, "rows positions vocab"]) -> Float[Tensor, "tokens vocab"]:
        """Of narrowed or whole logits, those that supervised tokens are predicted from; sample by sample.

        Raises:
            ValueError: the logits have another number of positions.
        """
        if logits.shape[:2] == self.labels.shape:
            return logits[self.sample, self.position]
        if logits.shape[:2] == (1, len(self.sample)) and self.head is not None:
            return logits[0]
        raise ValueError(
            f"per-sample gradients: the logits of {self.model_class} have shape {tuple(logits.shape)} for labels "
            f"of shape {tuple(self.labels.shape)}; expected one position per label: expand image positions in "
            "input_ids, and leave out prompt tuning, which puts positions before them"
        )

    def losses(self, logits: Float[Tensor, "rows positions vocab"]) -> Float[Tensor, " batch"]:
        """The samples' losses from narrowed or whole logits, as `icons.batch.sample_losses` has them.

        Raises:
            ValueError: see `of_tokens`.
        """
        return self.means(self.of_tokens(logits))

    def of_tokens(self, logits: Float[Tensor, "rows positions vocab"]) -> Float[Tensor, " tokens"]:
        """Each supervised token's loss, sample by sample.

        Raises:
            ValueError: see `supervised`; or a label is neither -100 nor a token.
        """
        rows = self.supervised(logits)
        refuse_strange_labels(self.bounds, rows.shape[1])
        return token_losses(rows, self.targets.to(rows.device))

    def means(self, losses: Float[Tensor, " tokens"]) -> Float[Tensor, " batch"]:
        """The samples' losses from their tokens'."""
        following = self.labels[:, 1:].to(losses.device)
        # every position is written once, so that the sum is deterministic on CUDA too (index_add is not)
        per_position = losses.new_zeros(following.shape).index_put((self.sample, self.position), losses)
        return per_position.sum(dim=1) / (following != IGNORE_INDEX).sum(dim=1).clamp(min=1)


def output_layer(model: nn.Module, trained: bool = False) -> nn.Module | None:
    """The module that makes logits, if it is known and (unless `trained`) nothing in it is trained."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module):
        return None
    return head if trained or not any(parameter.requires_grad for parameter in head.parameters()) else None


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
        slope = torch.empty_like(logits)
        for rows in chunks(logits):
            share = gradient[rows, None]
            part = F.log_softmax(logits[rows].to(share.dtype), dim=1).exp_().mul_(share)
            slope[rows] = part.scatter_add_(1, targets[rows, None], -share)
        return slope, None


def chunks(logits: Float[Tensor, "tokens vocab"]) -> Iterator[slice]:
    """Pieces of at most `CHUNK` logits, or of one row."""
    height = max(1, CHUNK // logits.shape[1])
    for begin in range(0, len(logits), height):
        yield slice(begin, begin + height)
