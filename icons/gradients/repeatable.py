"""Kernels that repeat: the same batch gives the same bits, whichever run computes it.

On a GPU the backward pass of attention adds in an order that differs from run to run unless told otherwise; in
bfloat16, over thirty layers, a row then moves by a per cent, and a resumed run's rows are not those of the run before.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import nn

from icons.gradients.shared_setting import SharedSetting

DRIFTING = ("cuda",)
"""Devices whose kernels repeat only when told to."""
SETTINGS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
"""What cuBLAS and flash-attention read from the environment; the former is cuBLAS's own size on recent cards."""

Result = TypeVar("Result")
_unrepeatable: WeakSet[nn.Module] = WeakSet()


class UnrepeatableWarning(UserWarning):
    """The model has an operation that adds in another order each time."""


def repeatable(model: nn.Module, device: torch.device, compute: Callable[[], Result]) -> Result:
    """What `compute` gives with deterministic kernels. A model that has an operation without one is computed without,
    from then on.

    Warns:
        UnrepeatableWarning: once for such a model.
    """
    if model not in _unrepeatable:
        try:
            with _deterministic() if device.type in DRIFTING else nullcontext():
                return compute()
        except RuntimeError as error:
            if device.type not in DRIFTING or "torch.use_deterministic_algorithms" not in str(error):
                raise
            _unrepeatable.add(model)
            warnings.warn(
                f"{type(model).__name__}: rows are right and do not repeat bit for bit: {str(error).split(',')[0]}",
                UnrepeatableWarning,
                stacklevel=4,
            )
    return compute()


@contextmanager
def _settings() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    environment = {name: os.environ.get(name) for name in SETTINGS}
    try:
        os.environ.update(SETTINGS)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_deterministic = SharedSetting(_settings)
