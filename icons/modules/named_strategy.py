"""What the command line calls the strategies that share a model out among the ranks."""

import sys
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only

from icons.modules.shared_model_strategy import SharedModelStrategy, group_size

NAME, _HYBRID = "model_parallel", "model_parallel_hybrid"
_FLATTENING = ("fsdp", "fsdp2", "fsdp_cpu_offload")


def named_strategy(flags: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """The Trainer's flags, as they are; from now on Lightning knows both names, each Trainer making its own.

    Raises:
        ValueError: the strategy cannot divide the ranks.
    """
    sharing_ranks(flags, ranks)
    over = {NAME: ("over all ranks", None), _HYBRID: ("over the ranks of each node", "node")}
    for name, (which, ranks_per_copy) in over.items():
        about = f"frozen weights sharded {which}"
        StrategyRegistry.register(name, SharedModelStrategy, about, override=True, ranks_per_copy=ranks_per_copy)
    return dict(flags)


def predicting_strategy(flags: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """The same for what tells samples' gradients apart, where `fsdp` becomes `model_parallel`; it says so."""
    if flags.get("strategy") in _FLATTENING:
        say(f"--trainer.strategy {flags['strategy']}: taken as {NAME} (FSDP2), under which gradients can be told apart")
        flags = {**flags, "strategy": NAME}
    return named_strategy(flags, ranks)


def sharing_ranks(flags: Mapping[str, Any], ranks: int) -> int:
    """Of all ranks those over which a prediction's frozen weights are sharded; 1: each has them whole.

    >>> sharing_ranks({"strategy": "fsdp"}, 8), sharing_ranks({"strategy": "ddp"}, 8), sharing_ranks({}, 8)
    (8, 1, 1)
    >>> sharing_ranks({"strategy": "model_parallel_hybrid", "num_nodes": 4}, 32)
    8

    Raises:
        ValueError: the ranks cannot be divided so.
    """
    strategy, nodes = flags.get("strategy"), int(flags.get("num_nodes", 1))
    if isinstance(strategy, SharedModelStrategy):
        return group_size(strategy.ranks_per_copy, ranks, nodes)
    if strategy == _HYBRID:
        return group_size("node", ranks, nodes)
    return ranks if strategy in (NAME, *_FLATTENING) or isinstance(strategy, ModelParallelStrategy) else 1


@rank_zero_only
def say(text: str) -> None:
    print(text, file=sys.stderr)
