"""Chance, which must have no part: a row that depends on it can be neither resumed nor compared."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from icons.terminal import counted


def refuse_dropout(model: nn.Module, training: Iterable[nn.Module]) -> None:
    """Checks that no module drops out (gradient-checkpointed layers may be in train mode).

    Args:
        model: any.
        training: its modules in train mode.

    Raises:
        ValueError: the first module that does, with its rate.
    """
    for module in training:
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
        if isinstance(rate, float) and rate > 0:
            name = next(name for name, other in model.named_modules() if other is module)
            raise ValueError(
                f"per-sample gradients: {name} drops out at random (rate {rate}), so a row would depend on chance; "
                "expected eval mode: call model.eval()"
            )


@contextmanager
def without_chance(model: nn.Module) -> Iterator[None]:
    """Around a forward pass: whatever way a model takes to chance, it draws from a generator, whose state then moves.

    Raises:
        ValueError: random numbers were drawn.
    """
    before = _states()
    yield
    if any(not torch.equal(one, two) for one, two in zip(before, _states(), strict=True)):
        training = [name or "the model itself" for name, module in model.named_modules() if module.training]
        blame = (
            f"{counted(len(training), 'module')} in train mode, {training[0]} first"
            if training
            else "it is in eval mode"
        )
        raise ValueError(
            f"per-sample gradients: {type(model).__name__} drew random numbers in its forward pass ({blame}), so a row "
            "would depend on chance; expected a pass without: call model.eval()"
        )


def _states() -> list[Tensor]:
    """Where torch's generators stand."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
