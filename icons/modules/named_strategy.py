"""What the command line calls the strategy that shares a model out among the ranks."""

import sys
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only

from icons.modules.sharded_fit import SharedModelStrategy

NAME = "model_parallel"
_FLATTENING = ("fsdp", "fsdp2", "fsdp_cpu_offload")


def named_strategy(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The Trainer's flags, as they are; from now on Lightning knows `model_parallel`, each Trainer making its own."""
    StrategyRegistry.register(NAME, SharedModelStrategy, "frozen weights sharded over the ranks", override=True)
    return dict(flags)


def predicting_strategy(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The same for what tells samples' gradients apart, where `fsdp` becomes `model_parallel`; it says so."""
    if flags.get("strategy") in _FLATTENING:
        say(f"--trainer.strategy {flags['strategy']}: taken as {NAME} (FSDP2), under which gradients can be told apart")
        flags = {**flags, "strategy": NAME}
    return named_strategy(flags)


def sharing_ranks(flags: Mapping[str, Any], ranks: int) -> int:
    """Ranks over which a prediction's frozen weights are sharded; 1: each has them whole.

    >>> sharing_ranks({"strategy": "fsdp"}, 8), sharing_ranks({"strategy": "ddp"}, 8), sharing_ranks({}, 8)
    (8, 1, 1)
    """
    strategy = flags.get("strategy")
    return ranks if strategy in (NAME, *_FLATTENING) or isinstance(strategy, ModelParallelStrategy) else 1


@rank_zero_only
def say(text: str) -> None:
    print(text, file=sys.stderr)
