"""Dropout, which must be off: a row that depends on chance can be neither resumed nor compared."""

from torch import nn


def refuse_dropout(model: nn.Module) -> None:
    """Checks that nothing in the model drops out (gradient-checkpointed layers may be in train mode).

    Raises:
        ValueError: the first module that does, with its rate.
    """
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
        if module.training and isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"per-sample gradients: {name} drops out at random (rate {rate}), so a row would depend on chance; "
                "expected eval mode: call model.eval()"
            )
