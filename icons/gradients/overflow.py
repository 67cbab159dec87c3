"""Activations that a GPU's memory does not hold lie in the CPU's meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
SHARE = 0.75  # of the memory that there is for us; the rest is for what a pass makes beside its activations


def fitted(device: torch.device, compute: Callable[[], Result]) -> Result:
    """What `compute` gives; where it does not fit the device's memory, once more with activations in the CPU's."""
    try:
        return compute()
    except torch.OutOfMemoryError:
        pass  # not here, where the error would still hold all that the first attempt has made
    with overflowing(device):
        return compute()


@contextmanager
def overflowing(device: torch.device) -> Iterator[None]:
    """Inside, what is saved for a backward pass stays on the GPU until three quarters of its memory are full; what is
    saved after that is copied to the CPU and back. No number changes.

    Args:
        device: whose memory is short.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    ours = min(free + torch.cuda.memory_reserved(device), total * torch.cuda.get_per_process_memory_fraction(device))
    with copied_to_cpu(device, lambda: torch.cuda.memory_allocated(device) > SHARE * ours):
        yield


@contextmanager
def copied_to_cpu(device: torch.device, full: Callable[[], bool]) -> Iterator[None]:
    """Inside, what is saved for a backward pass while the device is full lies in the CPU's memory."""

    def pack(value: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        return (device, value.cpu()) if value.device == device and full() else value

    def unpack(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].to(kept[0])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
