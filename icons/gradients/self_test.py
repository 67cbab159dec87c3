"""The self-test: does a sample's loss depend on nothing but the sample?

Not on padding, not on the samples beside it; and where it depends on the very token that it is to predict, one is told.
"""

import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from icons.batch import IGNORE_INDEX, OWN_FIELDS, Batch
from icons.gradients.output_layer import SupervisedPositions
from icons.gradients.packing import keep_unpacked
from icons.gradients.paths import Paths, is_text
from icons.gradients.structure import Members

_ROUTER_SHARES = ("router_aux_loss_coef", "aux_loss_coef")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


_told: WeakSet[nn.Module] = WeakSet()  # of the router's loss; what is known of a model otherwise may be given up


class SeesItsTargetWarning(UserWarning):
    """The model is not causal where tokens are supervised."""


class RouterLossWarning(UserWarning):
    """The model is trained with a loss of its routers too, which is no sample's own."""


class WholeLogitsWarning(UserWarning):
    """The output layer's results are changed afterwards: it runs on every position."""


def refuse_unknown(model: nn.Module, members: Members) -> None:
    """Refuses what can be told without a pass; what a structure tells is looked at once.

    Raises:
        ValueError: an encoder-decoder, outputs without names, or weights that are not there, not whole, or packed.
    """
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "return_dict", True) is False:
        raise ValueError(
            f"per-sample gradients: {kind} gives tuples (its config has return_dict=False); expected outputs with "
            "logits: set config.return_dict to True"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"per-sample gradients: {kind} is an encoder-decoder, whose labels are not its input's next tokens; "
            "expected a causal or image-text model"
        )
    keep_unpacked(model, members.modules)
    if members.structure.accepted:
        return
    named = dict(model.named_parameters())
    _refuse_pieces(model, named)
    empty = next((name for name, parameter in named.items() if parameter.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"per-sample gradients: {kind} has no weights ({empty} is on the meta device); expected a model that is "
            "loaded"
        )
    members.structure.accepted = True


def _refuse_pieces(model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
    """Frozen weights may be sharded by FSDP2, which gathers a layer's before it is called.

    Args:
        model: any.
        named: all its parameters.

    Raises:
        ValueError: what is trained is sharded, or a layer runs on pieces of its weights.
    """
    modules = dict(model.named_modules())
    whole_when_called = {
        id(parameter)
        for module in modules.values()
        if isinstance(module, FSDPModule) and isinstance(module, nn.Module)
        for parameter in module.parameters()
        if not parameter.requires_grad and sum(map(_is_shard, getattr(parameter, "placements", ()))) < 2
    }
    pieces = next(
        (
            name
            for name, parameter in named.items()
            if hasattr(parameter, "device_mesh") and id(parameter) not in whole_when_called
        ),
        None,
    )
    kinds = {type(part).__name__: name for name, part in modules.items()}
    pieces = pieces or kinds.get("FullyShardedDataParallel")
    if pieces is not None:
        raise ValueError(
            f"per-sample gradients: {type(model).__name__} is sharded over devices ({pieces}), where a layer's own "
            "weights are seen as pieces; expected whole trained weights on each device: fully_shard the frozen ones "
            "alone (ignored_params), as Trainer(strategy=ModelParallelStrategy()) has it, or use the strategy ddp"
        )


def _is_shard(placement: Any) -> bool:
    return not placement.is_replicate()


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
        self.ended, self.padded = _with_another_end(batch), _with_more_padding(model, batch, left)
        both = None if self.ended is None else _with_more_padding(model, self.ended, left) or self.ended
        with torch.no_grad():
            self.changed = _losses_or_none(model, both)

    @classmethod
    def of(cls, model: nn.Module, batch: Batch, known: Paths) -> "SelfTest | None":
        """The test; None if the model has passed it. It comes once per model, and once more when padding first stands
        on the left, and costs a forward pass, and one of a row alone."""
        mask = batch.get("attention_mask")
        left = mask is not None and bool((mask[:, 0] == 0).any())
        if _side(left) in known.tested or not bool((batch["labels"][:, 1:] != IGNORE_INDEX).any()):
            return None  # losses that are all zero tell nothing: the next batch is tested
        _tell_router_loss(model)
        return cls(model, batch, known, left)

    @torch.no_grad()
    def compare(self, losses: Float[Tensor, " batch"]) -> None:
        """Compares with the losses of the batch as it is.

        Raises:
            ValueError: a loss depends on padding, or on the samples of its batch.

        Warns:
            WholeLogitsWarning: logits are mixed or scaled by position after the output layer: it cannot be narrowed.
            SeesItsTargetWarning: a loss depends on the token that it is to predict.
            RouterLossWarning: the model's config asks for the loss of its routers.
        """
        model, causal, losses = self.model, True, losses.detach()
        if self.changed is None or _differ(model, losses, self.changed):
            losses = _whole_losses(model, self.batch, self.known, losses)
            _refuse(model, losses, _losses_or_none(model, self.padded), "its padding")
            changed = _losses_or_none(model, self.ended)
            causal = changed is None or not _differ(model, losses, changed)
        alone, row = _on_its_own(self.batch, by_row=not causal)
        _refuse(model, losses[row : row + 1], _losses_or_none(model, alone), "its padding or the samples beside it")
        if not causal:
            warnings.warn(
                f"{type(model).__name__}: a sample's loss depends on the very token that it is to predict: nothing "
                "hides later tokens from earlier ones (PaliGemma: token_type_ids 1 where the answer begins)",
                SeesItsTargetWarning,
                stacklevel=4,
            )
        self.known.tested.add(_side(self.left))


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


def _refuse(model: nn.Module, losses: Tensor, changed: Tensor | None, cause: str) -> None:
    if changed is not None and _differ(model, losses, changed):
        worst = int((losses - changed).abs().argmax())
        raise ValueError(
            f"per-sample gradients: in {type(model).__name__} a sample's loss depends on {cause}: got "
            f"{float(losses[worst]):.6g} in its batch and {float(changed[worst]):.6g} otherwise; expected the same: "
            "pad on the right, give all that the model's processor gives (token_type_ids), or batches of one row"
        )


def _whole_losses(model: nn.Module, batch: Batch, known: Paths, narrowed: Tensor) -> Float[Tensor, " batch"]:
    """The losses from all logits. Where they are others, the model is not narrowed any more."""
    whole = SupervisedPositions(model, batch["labels"], narrow=False).run(model, batch)
    if _differ(model, whole, narrowed):
        known.narrows = False
        warnings.warn(
            f"{type(model).__name__}: logits change after the output layer by more than their own position; it runs on "
            "all positions, not on the supervised ones alone",
            WholeLogitsWarning,
            stacklevel=5,
        )
    return whole


def _losses_or_none(model: nn.Module, batch: Batch | None) -> Float[Tensor, " batch"] | None:
    """The losses; None where the batch could not be changed, or where the model does not take it so."""
    if batch is None:
        return None
    try:
        return SupervisedPositions(model, batch["labels"], narrow=False).run(model, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


def _differ(model: nn.Module, one: Float[Tensor, " batch"], two: Float[Tensor, " batch"]) -> bool:
    """Whether losses differ by more than another order of the same sums, in the model's precision, explains."""
    half = any(value.dtype in (torch.float16, torch.bfloat16) for value in model.parameters())
    half = half or torch.is_autocast_enabled(one.device.type)
    both = one.isfinite() & two.isfinite()
    tolerance = 0.05 if half else 1e-4
    return bool(((one - two).abs() > tolerance * one.abs().clamp(min=0.1))[both].any())


def _with_another_end(batch: Batch) -> Batch | None:
    """The batch with another token at the end of each row: one that is only predicted, never read."""
    ids, labels = batch.get("input_ids"), batch["labels"]
    if ids is None or ids.shape != labels.shape:
        return None
    positions = torch.arange(labels.shape[1], device=labels.device)
    mask = batch.get("attention_mask", torch.ones_like(labels))
    if mask.shape != labels.shape:
        return None
    last = (positions * (mask != 0)).argmax(dim=1)
    rows = torch.arange(len(labels), device=labels.device)
    predicted = labels[rows, last] != IGNORE_INDEX
    targets = labels[labels != IGNORE_INDEX]
    other = targets[(targets[None] != ids[rows, last][:, None]).int().argmax(dim=1)]
    changed = ids.clone()
    changed[rows, last] = torch.where(predicted, other, ids[rows, last])
    return dict(batch) | {"input_ids": changed}


def _with_more_padding(model: nn.Module, batch: Batch, left: bool) -> Batch | None:
    """The batch with one column of padding more; None if there is no mask, or the model might have no such position."""
    length = batch["labels"].shape[1]
    if "attention_mask" not in batch or length >= _longest(model):
        return None
    padded = dict(batch)
    for name, value in batch.items():
        if (
            isinstance(value, Tensor)
            and value.shape[:2] == batch["labels"].shape
            and is_text(name, value, batch["labels"].shape)
        ):
            edge = value[:, :1] if left else value[:, -1:]
            fill = {"labels": IGNORE_INDEX, "attention_mask": 0}.get(name)
            column = edge if fill is None else torch.full_like(edge, fill)
            padded[name] = torch.cat([column, value] if left else [value, column], dim=1)
    return padded


def _longest(model: nn.Module) -> int:
    """Positions that the model has, by its configuration; 0 if it does not say."""
    config: Any = getattr(model, "config", None)
    texts = [config, getattr(config, "text_config", None), getattr(config, "llm_config", None)]
    lengths = [getattr(text, name, None) for text in texts if text is not None for name in _LENGTHS]
    return max((value for value in lengths if isinstance(value, int)), default=0)


def _on_its_own(batch: Batch, by_row: bool = False) -> tuple[Batch | None, int]:
    """The most padded row without its padding, and its number; None where the batch does not tell whose its images are.

    With `by_row`, a field whose first dimension is the batch's is taken to hold something for each row.
    """
    shape, mask = batch["labels"].shape, batch.get("attention_mask")
    counts: Mapping[str, Tensor] = batch.get("entries_per_row", {})
    fields = {name: value for name, value in batch.items() if name == "labels" or name not in OWN_FIELDS}
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    others = [value for name, value in tensors.items() if value.shape != shape and name not in counts]
    if mask is None or shape[0] < 2 or any(not by_row or value.shape[:1] != shape[:1] for value in others):
        return None, 0
    row = int(mask.sum(dim=1).argmin())
    kept = mask[row] != 0
    for name, value in tensors.items():
        if name in counts:
            fields[name] = value[int(counts[name][:row].sum()) :][: int(counts[name][row])]
        else:
            fields[name] = value[row : row + 1][:, kept] if value.shape == shape else value[row : row + 1]
    return {name: value for name, value in fields.items() if name not in counts or len(value)}, row
