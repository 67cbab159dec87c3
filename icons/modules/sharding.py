"""Frozen weights shared out among the ranks (FSDP2), for models larger than one device.

Each rank holds its part of every layer, and the whole of what is trained. A layer's weights are gathered when it is
called, forwards and backwards, and let go afterwards; `icons.modules.lockstep` lets ranks do so with rows of their own.
What is computed is what one process computes, to the last bit on a CPU. Ranks may be in groups that have a copy each,
as those of a node, and gather layers among themselves alone.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from icons.models.fingerprint import keep_description
from icons.modules.lockstep import Lockstep, LostRankError
from icons.modules.shared_model_strategy import SharedModelStrategy

KEPT = "_lockstep"
_MUCH = 0.25


class ShardedModule(LightningModule):
    """A module that computes with rows of its own on each rank, under `ModelParallelStrategy` with a shared model.

    Attributes:
        model: the model.
    """

    model: nn.Module

    def configure_model(self) -> None:
        """Shards the model's frozen weights, once for all its modules, under `ModelParallelStrategy`.

        Raises:
            ValueError: see `copies_of` and `shard`.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and len((copies := copies_of(strategy))[0]) > 1:
            lockstep = lockstep_of(self.model) or shard(self.model, strategy.root_device, copies)
            lockstep.begin()

    def on_predict_end(self) -> None:
        """Waits for the ranks that have rows left, if nothing else has.

        Raises:
            LostRankError: a rank has died.
        """
        if error := end_lockstep(self.trainer):
            raise error


def end_lockstep(trainer: Trainer) -> LostRankError | None:
    """To be called when this rank has no rows left: hands over its part of a sharded model until no rank needs it.

    Returns:
        An error if a rank has died meanwhile.
    """
    module = trainer.lightning_module
    lockstep = lockstep_of(module.model) if isinstance(module, ShardedModule) else None
    try:
        if lockstep is not None:
            lockstep.end()
    except LostRankError as error:
        return error
    return None


def lockstep_of(model: nn.Module) -> Lockstep | None:
    """Of the ranks that share a model; None: each has the whole."""
    return vars(model).get(KEPT)


def copies_of(strategy: ModelParallelStrategy) -> list[list[int]]:
    """The ranks that share a copy of the frozen weights, for each copy; to be called on every rank.

    Raises:
        ValueError: see `SharedModelStrategy.copies`; or Lightning's own strategy with sizes that ask for something
            else than sharding over all ranks.
    """
    if isinstance(strategy, SharedModelStrategy):
        return strategy.copies()
    sizes, world = tuple(strategy.device_mesh.shape), strategy.world_size
    if sizes not in ((strategy.num_nodes, strategy.num_processes), (world, 1)):  # what it takes by itself
        raise ValueError(
            f"ModelParallelStrategy(data_parallel_size={sizes[0]}, tensor_parallel_size={sizes[1]}): frozen weights "
            f"are sharded over all {world} ranks, and no layer is computed in parts (tensor parallelism); leave both "
            f"sizes out, or take SharedModelStrategy(ranks_per_copy={sizes[1]}) for {sizes[0]} copies"
        )
    return [list(range(world))]


def shard(model: nn.Module, device: torch.device, copies: Sequence[Sequence[int]]) -> Lockstep:
    """Shares the frozen weights of a model out among ranks; layer by layer, so that no device holds it whole.

    To be called on every rank, with the same model: whole, on the CPU. Trained parameters stay whole, and plain
    tensors, on every rank, as do single numbers. Units are gathered one by one (see `units`); the rest with the first
    of them, and a warning says so if it is much.

    Args:
        model: Hugging Face model; in the form in which it is called (with its adapter).
        device: this rank's.
        copies: the ranks that share a copy of the weights, for each copy; every rank once, as many for each.

    Raises:
        ValueError: base weights in 4 or 8 bits, or none that is frozen.
    """
    packed = next((name for name, parameter in model.named_parameters() if not parameter.is_floating_point()), None)
    if packed is not None:
        raise ValueError(
            f"sharding: {type(model).__name__} has base weights in 4 or 8 bits ({packed}); expected weights in "
            "bfloat16, float16 or float32: leave out either --quantize or the strategy that shards"
        )
    if not (frozen := frozen_in(model)):
        raise ValueError(
            f"sharding: every weight of {type(model).__name__} is trained, and trained weights stay whole on every "
            "device; expected a frozen base model with LoRA: use the strategy ddp"
        )
    keep_description(model)
    mesh = DeviceMesh(device.type, [list(ranks) for ranks in copies], mesh_dim_names=("copies", "shards"))["shards"]
    chosen = units(model)
    apart = {parameter for module in chosen for parameter in frozen_in(module)}
    share = sum(weight.numel() for weight in set(frozen) - apart) / max(1, sum(weight.numel() for weight in frozen))
    if share > _MUCH and dist.get_rank() == 0:
        warnings.warn(
            f"sharding: {share:.0%} of the frozen weights of {type(model).__name__} lie in no layer that can be "
            "gathered on its own; each device holds these whole while it computes",
            stacklevel=2,
        )
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad or not parameter.dim()}
    for module in [*chosen, model]:
        fully_shard(module, mesh=mesh, ignored_params=whole)
    layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
    lockstep = vars(model)[KEPT] = Lockstep(layers, mesh.get_group(), copies)
    return lockstep


def units(model: nn.Module) -> list[nn.Module]:
    """The modules inside that are gathered on their own; none lies in another, or shares a frozen weight with one.

    Layers as transformers marks them (`GradientCheckpointingLayer`, `_no_split_modules`), else the members of lists of
    modules; and embeddings and output layer.
    """
    modules = list(model.modules())
    marked = {name for module in modules for name in getattr(module, "_no_split_modules", None) or ()}
    layers = [m for m in modules if isinstance(m, GradientCheckpointingLayer) or type(m).__name__ in marked]
    listed = [member for module in modules if isinstance(module, nn.ModuleList) for member in module]
    layers += [member for member in listed if set(layers).isdisjoint(member.modules())]
    inner = {part for module in layers for part in module.modules() if part is not module}
    ends = [getattr(model, f"get_{name}_embeddings", lambda: None)() for name in ("input", "output")]
    plain = [module for module in ends if isinstance(module, nn.Module) and type(module) in (nn.Embedding, nn.Linear)]
    owners = Counter(id(weight) for module in modules for weight in module._parameters.values() if weight is not None)

    def is_apart(module: nn.Module) -> bool:
        own = Counter(id(weight) for part in module.modules() for weight in frozen_in(part, recurse=False))
        return bool(own) and all(owners[weight] == count for weight, count in own.items())

    chosen = dict.fromkeys([*plain, *(module for module in layers if module not in inner)])
    return [module for module in chosen if is_apart(module)]


def frozen_in(module: nn.Module, recurse: bool = True) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters(recurse) if not parameter.requires_grad]


def check_strategy(strategy: Any) -> None:
    """Refuses strategies under which a layer's weights are pieces that nothing puts together.

    Raises:
        ValueError: FSDP1, or DeepSpeed.
    """
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"strategy {type(strategy).__name__}: flattens a layer's weights, so that samples' gradients cannot be "
            "told apart; expected auto, ddp, or ModelParallelStrategy(), which shards a model's frozen weights over "
            "the ranks (on the command line: --trainer.strategy model_parallel)"
        )
