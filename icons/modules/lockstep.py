"""Lockstep: ranks that share one model's weights gather each layer together, whatever each of them is computing.

A gather needs all ranks. But ranks work on rows of their own: one has more batches than another, or repeats a pass, or
takes more of them for a sample that is not finite. So before a gather all ranks say which layer they want next. The
first of these is gathered; who wants another one hands over its part all the same, and asks again. Ranks that are done
hand over theirs until all are done. No pass has to be planned, and none is run for the others' sake. Ranks that share
another copy of the model are waited for at the end alone.
"""

import datetime
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

FOREVER = datetime.timedelta(days=365)  # how long a rank may read data, or wait for a disk
DONE = torch.iinfo(torch.int64).max
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1e-5, 0.02


class LostRankError(ValueError):
    """A rank has died, and with it its part of the model."""

    def __init__(self) -> None:
        super().__init__(
            "another rank of this run has died, and with it its part of the model; run the same line again"
        )


@contextmanager
def _all_living() -> Iterator[None]:
    """Around what needs all ranks.

    Raises:
        LostRankError: in place of what the library says when one of them is gone.
    """
    try:
        yield
    except RuntimeError as error:
        raise LostRankError from error


class Lockstep:
    """The gathers of one sharded model; to be made by all ranks at the same point, after the model was sharded.

    Args:
        layers: those that were sharded, in the order in which they are called, as far as that is known: ranks that
            have come apart meet sooner then.
        group: through which layers are gathered.
        copies: the ranks of every such group.
    """

    def __init__(self, layers: Sequence[FSDPModule], group: dist.ProcessGroup, copies: Sequence[Sequence[int]]) -> None:
        # on the CPU, whatever computes
        self.everyone = dist.new_group(backend="gloo", timeout=FOREVER)
        self.group, _ = dist.new_subgroups_by_enumeration(list(map(list, copies)), backend="gloo", timeout=FOREVER)
        self.gathers = [_LayerGather(self, index, layer, group) for index, layer in enumerate(layers)]
        for layer, gather in zip(layers, self.gathers, strict=True):
            layer.set_custom_all_gather(gather)  # type: ignore[arg-type]  # its base class is not public
        self.done = False

    def wait_for(self, index: int) -> None:
        """Returns when all ranks are about to gather layer `index`; until then gathers what others want."""
        count = len(self.gathers)
        wanted = 2 * count - 1 - index if _differentiating() else index
        while (chosen := self.agree(wanted)) != wanted:
            chosen_layer = min(chosen, 2 * count - 1 - chosen)
            if chosen_layer == index:  # forwards here, backwards there: the same weights
                return
            self.gathers[chosen_layer].take_part()

    def end(self) -> None:
        """To be called when this rank has nothing left to compute: returns when no rank has.

        Raises:
            LostRankError: a rank has died.
        """
        if self.done:
            return
        while (chosen := self.agree(DONE)) != DONE:
            self.gathers[min(chosen, 2 * len(self.gathers) - 1 - chosen)].take_part()
        self.agree(DONE, self.everyone)  # what follows may need all ranks, and wait for them for minutes only
        self.done = True

    def begin(self) -> None:
        """To be called before this rank computes again."""
        self.done = False

    def agree(self, wanted: int, group: dist.ProcessGroup | None = None) -> int:
        """The first of what all ranks want that share this copy; or of another group.

        Raises:
            LostRankError: a rank has died.
        """
        first = torch.tensor([wanted])
        wait_s = _FIRST_WAIT_S
        with _all_living():
            work = dist.all_reduce(first, dist.ReduceOp.MIN, group=group or self.group, async_op=True)
            while not work.is_completed():  # and not `wait`, in which no signal would be taken
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            work.wait()
        return int(first)


class _LayerGather:
    """Gathers one layer's weights for FSDP2, when all ranks do (`FSDPModule.set_custom_all_gather`)."""

    def __init__(self, lockstep: Lockstep, index: int, layer: FSDPModule, group: dist.ProcessGroup) -> None:
        self.lockstep, self.index, self.group = lockstep, index, group
        self.parts = _own_parts(layer)
        self.checked = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if not self.checked:
            assert torch.equal(self.own().view(torch.uint8), input_tensor.view(torch.uint8)), "shards in another order"
            self.checked = True
        self.lockstep.wait_for(self.index)
        with _all_living():
            return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)

    def take_part(self) -> None:
        """Hands over this rank's part of the layer, which another rank wants."""
        own = self.own()
        with _all_living():
            dist.all_gather_single(own.new_empty(self.group.size() * len(own)), own, group=self.group)

    def own(self) -> Tensor:
        """This rank's part of the layer as FSDP2 sends it: each weight's rows, with zeros where it has fewer."""
        parts = []
        for part in self.parts:
            local = part.to_local().detach().flatten()
            rows = -(-part.shape[0] // self.group.size())
            padding = rows * part.shape[1:].numel() - len(local)
            parts.append(nn.functional.pad(local, (0, padding)))
        if len({value.dtype for value in parts}) > 1:
            parts = [value.view(torch.uint8) for value in parts]
        return torch.cat(parts)


def _own_parts(layer: FSDPModule) -> list[DTensor]:
    """The sharded weights of a layer but for those of layers inside, in FSDP2's order."""
    weights: dict[DTensor, None] = {}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if not isinstance(child, FSDPModule):
                visit(child)
        weights.update({part: None for part in module.parameters(recurse=False) if isinstance(part, DTensor)})

    assert isinstance(layer, nn.Module)
    visit(layer)
    return list(weights)


def _differentiating() -> bool:
    """Whether a backward pass is under way in this thread."""
    return torch._C._current_graph_task_id() != -1
