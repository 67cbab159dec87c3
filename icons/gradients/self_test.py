"""The self-test: does a sample's loss depend on nothing but the sample?

Not on padding, not on the samples beside it; and where it depends on the very token that it is to predict, one is told.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icons.batch import IGNORE_INDEX, Batch
from icons.gradients.altered_batches import (
    cut_short,
    most_padded,
    padding_of,
    room,
    rows_of,
    suffices,
    telling_rows,
    use_of,
    with_another_end,
    with_more_padding,
    without_mask,
    without_padding,
)
from icons.gradients.paths import Paths
from icons.gradients.row_losses import LossComparison, RowLosses

_ROUTER_SHARES = ("router_aux_loss_coef", "aux_loss_coef")
_BESIDE = "the samples beside it"
_MUCH = 0.2  # of a row that is padding: a model that looks at it shows so by more than noise
_told: WeakSet[nn.Module] = WeakSet()  # of the router's loss; what is known of a model otherwise may be given up


class SeesItsTargetWarning(UserWarning):
    """The model is not causal where tokens are supervised."""


class RouterLossWarning(UserWarning):
    """The model is trained with a loss of its routers too, which is no sample's own."""


class WholeLogitsWarning(UserWarning):
    """The output layer's results are changed afterwards: it runs on every position."""


class SelfTest:
    """Losses of the batch changed in ways that must not matter, for `compare` with its own.

    Args:
        model: any.
        batch: with a supervised token.
        known: of the model.
        left: whether its padding stands on the left.
    """

    def __init__(self, model: nn.Module, batch: Batch, known: Paths, left: bool) -> None:
        self.model, self.batch, self.known, self.left = model, batch, known, left
        self.ended, self.padded = with_another_end(batch), with_more_padding(model, batch, left)
        self.comparison = LossComparison(model, batch)
        # the most padded row will be alone: all others are in other company without it, and in another order
        self.row, size = most_padded(batch), len(batch["labels"])
        self.others = [] if known.kind[1] else [row for row in reversed(range(size)) if row != self.row]
        changed = None if self.ended is None else with_more_padding(model, self.ended, left) or self.ended
        fewer = None if changed is None or not self.others else rows_of(changed, self.others)
        self.all = list(range(size))
        self.order = self.all if fewer is None else self.others
        self.changed = RowLosses.or_none(model, fewer or changed)
        self.unneeded = self.share_unneeded() if suffices(known, batch) is None else None

    @classmethod
    def of(cls, model: nn.Module, batch: Batch, known: Paths) -> "SelfTest | None":
        """The test; None if the model has passed it. It comes once per model and kind of batch (with images or
        without, of one row or more), and once more when padding first stands on the left, or first says whether a mask
        is needed; and costs a forward pass, and one of a row alone."""
        mask = batch.get("attention_mask")
        left = mask is not None and bool((mask[:, 0] == 0).any())
        tells = suffices(known, batch) is None and without_mask(batch) is not batch
        alike = {(_side(left), (one, known.kind[1])) for one in (False, known.kind[0])}  # more rows show what one does
        if alike & known.tested and not tells:
            return None
        if not bool((batch["labels"][:, 1:] != IGNORE_INDEX).any()):
            return None  # losses that are all zero tell nothing: the next batch is tested
        _tell_router_loss(model)
        return cls(model, batch, known, left)

    def unmasked(self, forward: Callable[[Batch], Tensor]) -> Float[Tensor, " tokens"] | None:
        """The losses of the batch without its attention mask, if it needs none; batches of its kind are then run
        without.

        Args:
            forward: gives the losses of a batch's supervised tokens.
        """
        if self.unneeded is None:
            known = suffices(self.known, self.batch) and without_mask(self.batch) is not self.batch
            return forward(without_mask(self.batch)) if known else None
        tokens = None
        if self.unneeded:
            tokens = forward(without_mask(self.batch))
            found = RowLosses.of(tokens.detach(), self.batch)
            if self.changed is None or not self.comparison.alike(found[self.order], self.changed, self.order):
                masked = RowLosses.or_none(self.model, self.batch, narrow=self.known.narrows)
                if masked is None or not self.comparison.alike(found, masked, self.all):
                    tokens, self.unneeded = None, 0.0
        self.known.unmasked[use_of(self.batch)] = self.unneeded
        return tokens

    def share_unneeded(self) -> float | None:
        """With which share of padding on the right the batch's losses were the same with its attention mask and
        without: 1 if with much, which shows it for any; 0: they were not; None: nothing can be told."""
        if without_mask(self.batch) is self.batch:
            return None
        rows, length = telling_rows(self.batch), self.batch["labels"].shape[1]
        few = rows_of(self.batch, rows)
        given, which = (self.batch, self.all) if few is None else (few, rows)
        tried = [(with_more_padding(self.model, given, False, room(self.model, length)) or given, which)]
        if float(padding_of(tried[0][0]).max()) < _MUCH and not self.known.kind[1]:
            tried = [(short, which) for short in [cut_short(given)] if short is not None]
        for padded, numbers in (*tried, (self.batch, self.all)):
            masked, share = RowLosses.or_none(self.model, padded, narrow=True), padding_of(padded)
            if masked is None or not bool((most := (share * masked.means().isfinite()).max()) > 0):
                continue
            bare = RowLosses.or_none(self.model, without_mask(padded), narrow=True)
            if bare is None or not self.comparison.alike(bare, masked, numbers):
                return 0.0
            return 1.0 if most >= _MUCH else float(most)
        return None

    @torch.no_grad()
    def compare(self, tokens: Float[Tensor, " tokens"]) -> None:
        """Compares with the losses of the batch as it is, which are its supervised tokens'.

        Raises:
            ValueError: a loss depends on padding, or on the samples of its batch.

        Warns:
            WholeLogitsWarning: logits are mixed or scaled by position after the output layer: it cannot be narrowed.
            SeesItsTargetWarning: a loss depends on the token that it is to predict.
            RouterLossWarning: the model's config asks for the loss of its routers.
        """
        model, causal = self.model, True
        losses = RowLosses.of(tokens.detach(), self.batch)
        if self.changed is None or self.comparison.differ(losses[self.order], self.changed, self.order):
            losses = self.whole(losses)
            self.refuse(losses, self.padded, self.all, "its padding")
            changed = RowLosses.or_none(model, self.ended)
            causal = changed is None or not self.comparison.differ(losses, changed, self.all)
            if self.others:
                fewer = rows_of(self.batch, self.others, not causal)
                self.refuse(losses[self.others], fewer, self.others, _BESIDE)
        if len(losses.rows) > 1 and "attention_mask" in self.batch:
            one = rows_of(self.batch, [self.row], by_row=not causal)
            alone = None if one is None else without_padding(one)
            self.refuse(losses[[self.row]], alone, [self.row], f"its padding or {_BESIDE}")
        if not causal:
            warnings.warn(
                f"{type(model).__name__}: a sample's loss depends on the very token that it is to predict: nothing "
                "hides later tokens from earlier ones (PaliGemma: token_type_ids 1 where the answer begins)",
                SeesItsTargetWarning,
                stacklevel=4,
            )
        self.known.tested.add((_side(self.left), self.known.kind))

    def fail(self) -> None:
        """What was not passed in the end comes again, with the next batch."""
        self.known.tested.discard((_side(self.left), self.known.kind))
        self.known.unmasked.pop(use_of(self.batch), None)

    def refuse(self, losses: RowLosses, batch: Batch | None, rows: Sequence[int], cause: str) -> None:
        """Refuses a model whose losses are others when the batch is this one."""
        changed = RowLosses.or_none(self.model, batch)
        if changed is not None and self.comparison.differ(losses, changed, rows):
            one, other = losses.means(), changed.means()
            worst = int((one - other).abs().nan_to_num(0, 0).argmax())
            raise ValueError(
                f"per-sample gradients: in {type(self.model).__name__} a sample's loss depends on {cause}: got "
                f"{float(one[worst]):.6g} in its batch and {float(other[worst]):.6g} otherwise; expected the "
                "same: pad on the right, give all that the model's processor gives (token_type_ids), or batches of one "
                "row"
            )

    def whole(self, narrowed: RowLosses) -> RowLosses:
        """The losses from all logits. Where they are others, the model is not narrowed any more."""
        losses = RowLosses.by(self.model, self.batch)
        if self.comparison.differ(losses, narrowed, self.all):
            self.known.narrows = False
            warnings.warn(
                f"{type(self.model).__name__}: logits change after the output layer by more than their own position; "
                "it runs on all positions, not on the supervised ones alone",
                WholeLogitsWarning,
                stacklevel=5,
            )
        return losses


def _side(left: bool) -> str:
    return "left" if left else "right"


def _tell_router_loss(model: nn.Module) -> None:
    """Says once that the balance of a mixture of experts, where training asks for it, is left out: it is a batch's."""
    if model in _told:
        return
    _told.add(model)
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        share = next((getattr(part, name) for name in _ROUTER_SHARES if hasattr(part, name)), None)
        if getattr(part, "output_router_logits", False) and share != 0:
            warnings.warn(
                f"{type(model).__name__}: the router's loss is not part of the sample's loss: its config asks for one "
                f"(output_router_logits, with a share of {share}), which is the whole batch's",
                RouterLossWarning,
                stacklevel=5,
            )
            return
