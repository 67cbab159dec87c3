"""The noise of half precision: what another order of the same sums may do to a model's results."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


def is_half(model: nn.Module, device: torch.device) -> bool:
    """Whether anything in a pass is float16 or bfloat16."""
    return any(value.dtype in _HALF for value in model.parameters()) or torch.is_autocast_enabled(device.type)


@contextmanager
def shaken(model: nn.Module, generator: torch.Generator) -> Iterator[set[nn.Module]]:
    """Moves each result of each layer in half precision by up to a unit in its last place: as much as any order of its
    sums can do, and for all of its numbers at once. Yields the modules whose results have been moved so far."""
    moved = set[nn.Module]()

    def shake(module: nn.Module, _args: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or output.dtype not in _HALF:
            return None
        moved.add(module)
        noise = torch.empty_like(output).uniform_(-1, 1, generator=generator)
        return torch.addcmul(output, output, noise, value=torch.finfo(output.dtype).eps)

    handles = [part.register_forward_hook(shake) for part in model.modules() if not part._modules]
    try:
        yield moved
    finally:
        for handle in handles:
            handle.remove()
