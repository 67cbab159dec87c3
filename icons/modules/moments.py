"""What a fit leaves behind: the trained weights whole, and Adam's moments by parameter name, under any strategy."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)

from icons.models.warmup_folder import Trained


def gather(trainer: Trainer, module: LightningModule) -> Trained | None:
    """Collects what was trained of `module.model` on rank 0; every rank must call this, before the fit is torn down.

    A parameter that never got a gradient has zero moments. `step` is that of the parameter that took the most steps.

    Returns:
        None on every other rank.
    """
    optimizer, strategy = trainer.optimizers[0], trainer.strategy
    weights: dict[str, Tensor] = {}
    state: Mapping[str, Any] = {}
    if isinstance(strategy, DeepSpeedStrategy):
        weights = _deepspeed_weights(module, partitioned=strategy.zero_stage_3)
    elif isinstance(strategy, FSDPStrategy):
        assert strategy.model is not None
        names = _trained_parameters(module)
        offload = strategy.root_device.type != "cpu"  # copying from the CPU to itself crashes torch 2.13
        rank0 = FullStateDictConfig(offload, True), FullOptimStateDictConfig(offload, True)
        with FullyShardedDataParallel.state_dict_type(strategy.model, StateDictType.FULL_STATE_DICT, *rank0):
            whole = strategy.model.state_dict()
            state = FullyShardedDataParallel.optim_state_dict(strategy.model, optimizer).get("state", {})
        weights = {name: value for name, value in whole.items() if name in names}
    elif trainer.is_global_zero:
        weights = _trained_parameters(module)
        named = {id(parameter): name for name, parameter in weights.items()}
        state = {named[id(parameter)]: values for parameter, values in optimizer.state.items()}
    if not trainer.is_global_zero:
        return None
    weights = {name.removeprefix("model."): value.detach().cpu() for name, value in weights.items()}
    state = {name.removeprefix("model."): values for name, values in state.items()}
    group = optimizer.param_groups[0]
    return Trained(
        weights=weights,
        exp_avg=moments(state, "exp_avg", weights),
        exp_avg_sq=moments(state, "exp_avg_sq", weights),
        step=max((int(values["step"]) for values in state.values()), default=0),
        betas=(group["betas"][0], group["betas"][1]),
        eps=group["eps"],
    )


def _trained_parameters(module: LightningModule) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name.replace("_fsdp_wrapped_module.", ""): parameter for name, parameter in trained.items()}


def moments(state: Mapping[str, Any], which: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One of Adam's two moments of each parameter, float32; none at all when there is no state."""
    if not state:
        return {}
    zeros = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in weights.items()}
    return zeros | {name: values[which].float().cpu() for name, values in state.items()}


def _deepspeed_weights(module: LightningModule, partitioned: bool) -> dict[str, Tensor]:
    """The trained parameters, copied while DeepSpeed has put them together (stage 3 keeps a part on each rank)."""
    trained = _trained_parameters(module)
    if not partitioned:
        return trained
    import deepspeed  # type: ignore[import-not-found,unused-ignore]

    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: value.detach().cpu().clone() for name, value in trained.items()}
