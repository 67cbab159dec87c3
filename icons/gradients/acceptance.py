"""What can be told of a model without a pass: whether its samples' gradients can be taken at all."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from icons.gradients.packing import keep_unpacked
from icons.gradients.structure import Members


def refuse_unknown(model: nn.Module, members: Members) -> None:
    """Refuses what can be told without a pass; what a structure tells is looked at once.

    Raises:
        ValueError: an encoder-decoder, outputs without names, weights that are not there, not whole, not real, or
            packed, or that are trained as soon as their gradient is there.
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
    entangled = next(
        (name for name, parameter in named.items() if parameter.requires_grad and parameter.is_complex()), None
    )
    if entangled is not None:
        raise ValueError(
            f"per-sample gradients: {kind} trains complex numbers ({entangled}), which a row of real ones cannot hold; "
            "expected them frozen, or kept as real and imaginary parts (torch.view_as_real)"
        )
    trained = members.trainable.items()
    stepping = next((name for name, parameter in trained if parameter._post_accumulate_grad_hooks), None)
    if stepping is not None:
        raise ValueError(
            f"per-sample gradients: {kind} runs code of its own as soon as a gradient is there ({stepping} has a "
            "post-accumulate-grad hook, as for an optimizer inside the backward pass), which would take each sample "
            "for a training step; expected none: remove it by its handle"
        )
    members.structure.accepted = True


def refuse_absent(module: nn.Module, name: str) -> None:
    """Refuses an adapter that took no part because it is merged or switched off.

    Args:
        module: around the parameter.
        name: of a parameter that no call has met.

    Raises:
        ValueError: it is.
    """
    state = "merged" if getattr(module, "merged", False) is True else "disabled"
    if state == "merged" or getattr(module, "disable_adapters", False) is True:  # elsewhere it is a method
        raise ValueError(
            f"per-sample gradients: the adapter of {name} is {state}: its gradient would be a silent zero; expected it "
            f"to take part: call {'unmerge_adapter()' if state == 'merged' else 'enable_adapter_layers()'} first"
        )


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
