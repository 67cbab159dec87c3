"""LoRA on the language model: fresh for a warm-up, or loaded from PEFT's, LLaVA's or a Trainer's folders."""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from icons.models.adam_state.deepspeed import is_deepspeed, read_deepspeed
from icons.models.parameter_names import current_name
from icons.models.tensor_files import read_tensors

# What LLaVA's find_all_linear_names finds, before tower and projector exist. As a regular expression: PEFT would
# match a list of suffixes in the vision tower too.
LLAVA_TARGETS = r"^model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj$"
NON_LORA = ("non_lora.safetensors", "non_lora_trainables.bin", "non_lora_trainables.safetensors")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRANSPOSED = "Conv1D"  # GPT-2's linear layer
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
        fan_in_fan_out=any(type(module).__name__ == TRANSPOSED for _, module in model.named_modules()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return wrap(model, config)


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """Wraps exactly the modules that the adapter in `folder` has weights for, and sets every one of them.

    Accepts PEFT's form under any naming: transformers 5, older transformers, original LLaVA.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
        ValueError: it is not LoRA, belongs to another model, or a tensor could not be set: names it.
    """
    config = read_adapter_config(folder)
    known = {name for name, _ in model.named_modules()}
    tensors = {own_name(name, known): value for name, value in read_tensors(adapter_file(folder)).items()}
    modules = {
        name.removeprefix("base_model.model.").rpartition(".lora_A.")[0] for name in tensors if ".lora_A." in name
    }
    if strange := sorted(modules - known):
        raise ValueError(
            f"{folder}: the adapter has weights for {len(strange)} modules that the model lacks, such as "
            f"{', '.join(strange[:SHOWN])}; expected the adapter of this very model: see its base_model_name_or_path"
        )
    if not modules:
        raise ValueError(
            f"{folder}: the adapter holds no LoRA tensor (got {len(tensors)} others); expected lora_A, lora_B"
        )
    config.target_modules = whole_targets(modules, known)
    config.inference_mode = False
    wrapped = wrap(model, config)
    set_tensors(wrapped, tensors, folder)
    return wrapped


def own_name(name: str, known: set[str]) -> str:
    """What a saved tensor is called in a model with the `known` modules: as saved, or by today's name.

    >>> own_name("base_model.model.model.layers.0.q_proj.lora_A.weight", {"model.language_model.layers.0.q_proj"})
    'base_model.model.model.language_model.layers.0.q_proj.lora_A.weight'
    """
    inner = name.removeprefix("base_model.model.")
    module = inner.partition(".lora_")[0] if ".lora_" in inner else inner.rpartition(".")[0]
    return name if module in known else current_name(name)


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
    names = {name.rpartition(".")[2] for name, module in decoder.named_modules() if is_linear(module)}
    start = re.escape(prefix + ".") if prefix else ""
    return rf"^{start}(?:.+\.)?({'|'.join(sorted(map(re.escape, names)))})$"


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == TRANSPOSED  # quantised ones derive from nn.Linear


def whole_targets(modules: set[str], known: set[str]) -> str | list[str]:
    """LLaVA's expression where it says the same as the list of names: shorter, and it reads as what it is."""
    llava = {name for name in known if re.fullmatch(LLAVA_TARGETS, name)}
    return LLAVA_TARGETS if modules == llava else "|".join(re.escape(name) for name in sorted(modules))


def read_adapter_config(folder: Path) -> LoraConfig:
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder}: no adapter here (adapter_config.json is missing); expected PEFT's or LLaVA's"
        )
    values = json.loads(file.read_text())
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {values.get('peft_type')!r}; expected 'LORA', the only kind supported")
    if values.get("use_dora"):
        raise ValueError(f"{file}: is DoRA (use_dora); expected plain LoRA: its magnitudes are not linear layers")
    known = LoraConfig.__dataclass_fields__
    kept = {name: value for name, value in values.items() if name in known and value is not None}
    for name in ("loftq_config", "auto_mapping", "layers_pattern", "layers_to_transform", "exclude_modules"):
        kept.pop(name, None)  # which modules are wrapped follows from the tensors
    return LoraConfig(**kept)


def adapter_file(folder: Path) -> Path:
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{folder}: has adapter_config.json and no weights; expected one of {', '.join(ADAPTER_FILES)}"
    )


def non_lora_tensors(adapter: Path) -> dict[str, Tensor]:
    """What was trained beside LoRA: from the adapter's folder, or from the DeepSpeed state in a `checkpoint-N`."""
    for name in NON_LORA:
        if (adapter / name).is_file():
            return read_tensors(adapter / name)
    if is_deepspeed(adapter):
        weights: Mapping[str, Tensor] = read_deepspeed(adapter).weights
        return {name: value for name, value in weights.items() if "lora_" not in name}
    return {}


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: Path | str, adapter: str = "default") -> None:
    """Sets the adapter's tensors by name, and checks that every one found its place and no place was left out.

    Raises:
        ValueError: a tensor has no place, another shape, or a LoRA parameter got no tensor.
    """
    places = dict(model.named_parameters())
    unset = {name for name in places if "lora_" in name}
    for name, value in tensors.items():
        place = next((known for known in spellings(name, adapter) if known in places), None)
        if place is None:
            raise ValueError(
                f"{source}: the tensor {name} has no place in the model; expected an adapter of this model"
            )
        if places[place].shape != value.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(value.shape)}, the model's {tuple(places[place].shape)}; expected "
                "the same: is it the adapter of a model of another size?"
            )
        with torch.no_grad():
            places[place].copy_(value)
        unset.discard(place)
    if unset:
        raise ValueError(
            f"{source}: no tensor for {len(unset)} parameters of the adapter, such as {sorted(unset)[0]}; the file is "
            "incomplete: copy or download it again"
        )


def spellings(name: str, adapter: str) -> list[str]:
    """Where PEFT may keep a saved tensor: as it is, under the adapter's name, or in a `modules_to_save` copy.

    >>> spellings("base_model.model.x.lora_A.weight", "default")[1]
    'base_model.model.x.lora_A.default.weight'
    """
    module, _, last = name.rpartition(".")
    return [name, f"{module}.{adapter}.{last}", f"{module}.modules_to_save.{adapter}.{last}"]


def merge_into(weights: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights with the LoRA adapter in `folder` added: W + scale B A, computed in float32.

    For an adapter that is part of the model (xtuner's on the vision tower). Names are compared without what stands
    before the layers (`vision_model.`), which differs between versions.

    Raises:
        ValueError: the adapter has weights for a layer that is not there.
    """
    config = read_adapter_config(folder)
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    merged = dict(weights)
    tensors = read_tensors(adapter_file(folder))
    for name in [name for name in tensors if ".lora_A." in name]:
        module = name.partition(".lora_A.")[0].removeprefix("base_model.model.").removeprefix("vision_model.")
        place = next((key for key in weights if key.removeprefix("vision_model.") == f"{module}.weight"), None)
        if place is None:
            raise ValueError(
                f"{folder}: adapts {module}, which the vision tower lacks; expected an adapter of this tower"
            )
        delta = tensors[name.replace(".lora_A.", ".lora_B.")].float() @ tensors[name].float()
        merged[place] = (weights[place].float() + scale * delta).to(weights[place].dtype)
    return merged
