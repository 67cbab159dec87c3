"""Training what is whole on every rank beside frozen weights that are sharded."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from icons.modules.sharding import ShardedModule, lockstep_of
from icons.modules.shared_model_strategy import SharedModelStrategy


class ShardedFit(ShardedModule):
    """A module that is trained, as under DDP, where its frozen weights may be sharded: gradients are the ranks' mean.

    Ranks meet before anything else that needs all of them: one may still be gathering layers for its batch.
    """

    def configure_model(self) -> None:
        """Shards the model's frozen weights; see `ShardedModule`.

        Raises:
            ValueError: see there; or Lightning's own strategy.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, SharedModelStrategy):
            raise ValueError(
                f"{type(self).__name__}: got {type(strategy).__name__}, whose checkpoints hold the base model, and "
                "which gives all ranks of a node the same rows; expected SharedModelStrategy() in its place"
            )
        super().configure_model()

    def meet(self) -> None:
        """Returns when all ranks have come here.

        Raises:
            LostRankError: a rank has died.
        """
        if (lockstep := lockstep_of(self.model)) is not None:
            lockstep.end()
            lockstep.begin()

    def on_train_start(self) -> None:
        """All ranks begin with the first one's weights."""
        if lockstep_of(self.model) is not None:
            for parameter in trained(self.model):
                dist.broadcast(parameter.data, 0)

    def on_after_backward(self) -> None:
        """Averages gradients over the ranks."""
        if lockstep_of(self.model) is not None:
            self.meet()
            _average_gradients(trained(self.model))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of all ranks' gradients; of a parameter without any on every rank, None, which no optimizer counts as a
    step. What earlier batches of an accumulated step have left is the same on all ranks, and stays."""
    parameters = list(parameters)
    flags = [int(parameter.grad is not None) for parameter in parameters]
    used = torch.tensor(flags, device=parameters[0].device)
    dist.all_reduce(used)
    for parameter, count in zip(parameters, used.tolist(), strict=True):
        if count:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            parameter.grad = gradient.div_(dist.get_world_size())
