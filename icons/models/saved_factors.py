"""Kronecker factors from their file, for the very model that they were made with."""

from pathlib import Path

from torch import nn

from icons.agreement import check_compatible
from icons.kronecker import KroneckerFactors
from icons.models.fingerprint import adapter_fingerprint, base_description


def load_factors(file: Path, model: nn.Module) -> KroneckerFactors:
    """The factors in a file that `icons factors` wrote.

    Raises:
        ValueError: the file is none of these, is damaged, or was made with another model, adapter or target.
    """
    factors = KroneckerFactors.load(Path(file))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {"model": base_description(model), "adapter": {"fingerprint": adapter_fingerprint(model)}}
    remedy = "expected factors of this very model: make them with `icons factors` and the same checkpoint and --target"
    for what in ("adapter.fingerprint", "model.fingerprint"):
        check_compatible(factors.manifest, own, [what], str(file), "the model", remedy)
    if odd := sorted(trained ^ set(factors.square)):
        raise ValueError(f"{file}: {odd[0]} is trainable or has factors, not both; {remedy}")
    return factors
