"""What a model is, in a few hex digits: of its trained parameters every value, of its frozen ones a sample."""

import hashlib

import torch
from torch import Tensor, nn

_SAMPLED_VALUES = 1024
_KEPT = "_whole_description"


def num_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_fingerprint(model: nn.Module) -> str:
    """SHA-256 (16 hex digits) over names, shapes and all values of the trainable parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(_as_bytes(parameter.detach().float()))
    return digest.hexdigest()[:16]


def keep_description(model: nn.Module) -> None:
    """To be called before the model's weights are sharded: what it is stays known on every rank."""
    vars(model)[_KEPT] = base_description(model)


def base_description(model: nn.Module) -> dict[str, str]:
    """The base model's `class` and `fingerprint`; of a sharded model those of the whole one."""
    kept: dict[str, str] | None = vars(model).get(_KEPT)
    return kept or {"class": type(model).__name__, "fingerprint": base_fingerprint(model)}


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 (16 hex digits) over names, shapes, dtypes and up to 1,024 evenly spaced values of each frozen tensor.

    A sample, since hashing 7 billion numbers would take longer than it is worth; a fine-tuned base differs in nearly
    every value.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            values = parameter.detach().flatten()
            digest.update(_as_bytes(values[:: max(1, len(values) // _SAMPLED_VALUES)][:_SAMPLED_VALUES]))
    return digest.hexdigest()[:16]


def _as_bytes(values: Tensor) -> bytes:
    return values.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
