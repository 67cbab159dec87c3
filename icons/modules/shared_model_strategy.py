"""SharedModelStrategy: ranks that share one model, or, group by group, a copy of it each."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer


class SharedModelStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with checkpoints as under DDP: one file, of what is trained, by rank 0.

    Lightning's own puts the whole base model into each of them.

    Args:
        ranks_per_copy: over how many ranks, next to each other, the frozen weights are sharded, each such group having
            a copy; `node`: over those of each node, so that no layer is gathered between nodes (FSDP's HYBRID_SHARD);
            None: over all ranks.
        process_group_backend, timeout: as Lightning's.
    """

    def __init__(
        self,
        ranks_per_copy: int | Literal["node"] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.ranks_per_copy = ranks_per_copy

    def copies(self) -> list[list[int]]:
        """The ranks of each copy, as many for each; to be called on every rank.

        Raises:
            ValueError: see `group_size`; or one node has more ranks than another.
        """
        count = self.world_size
        if self.ranks_per_copy != "node":
            size = group_size(self.ranks_per_copy, count)
            return [list(range(first, first + size)) for first in range(0, count, size)]
        nodes: list[Any] = [None] * count  # asked, since a scheduler may number ranks across nodes
        dist.all_gather_object(nodes, self.node_rank)
        found = [[rank for rank in range(count) if nodes[rank] == node] for node in sorted(set(nodes))]
        if len(sizes := {len(ranks) for ranks in found}) > 1:
            raise ValueError(
                f"ranks_per_copy 'node': got nodes of {min(sizes)} and of {max(sizes)} ranks; expected as many on each"
            )
        group_size("node", count, len(found))
        return found

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank has rows of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, by name."""
        assert self.lightning_module is not None
        named = self.lightning_module.named_parameters()
        return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Sets what is trained; every name must be there."""
        assert self.lightning_module is not None
        places = dict(self.lightning_module.named_parameters())
        with torch.no_grad():
            for name, value in checkpoint["state_dict"].items():
                places[name].copy_(value)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)


def group_size(ranks_per_copy: int | Literal["node"] | None, ranks: int, nodes: int = 1) -> int:
    """Over how many ranks of all a copy of the frozen weights is sharded; see `SharedModelStrategy`.

    >>> group_size(None, 16, nodes=2), group_size("node", 16, nodes=2), group_size(4, 16, nodes=2)
    (16, 8, 4)

    Raises:
        ValueError: several ranks that cannot be divided so, or of which each would have a whole copy.
    """
    size = ranks // nodes if ranks_per_copy == "node" else ranks_per_copy or ranks
    if size < 2 <= ranks:
        raise ValueError(
            f"sharding: got one rank for each copy of the frozen weights ({ranks} ranks, {nodes} nodes), which would "
            "be whole on each; expected several on a node: take model_parallel, which shards over all ranks, or ddp"
        )
    if ranks % size:
        raise ValueError(
            f"ranks_per_copy {ranks_per_copy}: got {ranks} ranks; expected a number of ranks that {size} divides"
        )
    return size
