"""LoRA on the language model, fresh for a warm-up; and what an adapter's folder holds."""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from icons.models.adam_state.deepspeed import is_deepspeed, read_deepspeed
from icons.models.tensor_files import read_tensors

# What LLaVA's find_all_linear_names finds, before tower and projector exist. As a regular expression: PEFT would
# match a list of suffixes in the vision tower too.
LLAVA_TARGETS = r"^model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj$"
NON_LORA = ("non_lora.safetensors", "non_lora_trainables.bin", "non_lora_trainables.safetensors")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TRANSPOSED = "Conv1D"  # GPT-2's linear layer
SHOWN = 3


@dataclass(frozen=True)
class LoraSettings:
    """A fresh adapter; the defaults are LLaVA's and the paper's."""

    rank: int = 128
    alpha: float = 256
    dropout: float = 0.05
    targets: str | None = None
    """Regular expression over module names; default: the language model's linear layers, never the vision tower's."""
    seed: int = 0
    """Of the first values of the A matrices (the B matrices start at zero)."""


def add_lora(model: nn.Module, settings: LoraSettings) -> PeftModel:
    """Wraps the language model's linear layers in a fresh adapter; the model is in eval mode afterwards.

    Raises:
        ValueError: the model has LoRA already, or no module is matched.
    """
    targets = settings.targets or default_targets(model)
    if not any(re.fullmatch(targets, name) for name, _ in model.named_modules()):
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"LoRA targets {targets!r}: match no module; expected a regular expression for names such as "
            f"{names[:SHOWN]}"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=targets,
        fan_in_fan_out=any(type(module).__name__ == _TRANSPOSED for _, module in model.named_modules()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return wrap(model, config)


def wrap(model: nn.Module, config: LoraConfig) -> PeftModel:
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("LoRA: the model has LoRA layers already; expected a base model: load it without an adapter")
    config.base_model_name_or_path = None  # of another machine
    with warnings.catch_warnings():
        # PEFT asks transformers for a property under its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped.eval()  # get_peft_model leaves dropout on


def default_targets(model: nn.Module) -> str:
    """A regular expression for the linear layers inside the language model's blocks.

    LLaVA's own for LLaVA; for other models what stands below the decoder that transformers names, the output layer
    (which is outside of it) left out.
    """
    config: Any = model.config
    if config.model_type == "llava":
        return LLAVA_TARGETS
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    names = {name.rpartition(".")[2] for name, module in decoder.named_modules() if _is_linear(module)}
    start = re.escape(prefix + ".") if prefix else ""
    return rf"^{start}(?:.+\.)?({'|'.join(sorted(map(re.escape, names)))})$"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == _TRANSPOSED  # quantised ones derive from nn.Linear


def read_adapter_config(folder: Path) -> LoraConfig:
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder}: no adapter here (adapter_config.json is missing); expected PEFT's or LLaVA's"
        )
    values = json.loads(file.read_text())
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {values.get('peft_type')!r}; expected 'LORA', the only kind supported")
    known = LoraConfig.__dataclass_fields__
    kept = {name: value for name, value in values.items() if name in known and value is not None}
    if values.get("target_parameters"):
        raise ValueError(
            f"{file}: adapts single parameters (target_parameters {values['target_parameters']}); expected LoRA on "
            "modules: per-sample gradients of stacked experts are not supported"
        )
    for name in ("loftq_config", "auto_mapping", "layers_pattern", "layers_to_transform", "exclude_modules"):
        kept.pop(name, None)  # which modules are wrapped follows from the tensors
    return LoraConfig(**kept)


def adapter_file(folder: Path) -> Path:
    for name in _ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    has = "has adapter_config.json and no weights" if (folder / "adapter_config.json").is_file() else "is no adapter"
    raise FileNotFoundError(f"{folder}: {has}; expected one of {', '.join(_ADAPTER_FILES)}")


def non_lora_tensors(adapter: Path) -> dict[str, Tensor]:
    """What was trained beside LoRA: from the adapter's folder, or from the DeepSpeed state in a `checkpoint-N`."""
    for name in NON_LORA:
        if (adapter / name).is_file():
            return read_tensors(adapter / name)
    if is_deepspeed(adapter):
        return {name: value for name, value in read_deepspeed(adapter).weights.items() if "lora_" not in name}
    return {}
