"""Adapters as found: PEFT's, LLaVA's and the Trainer's folders, under any version's names, into the model.

What PEFT loads is loaded with equal logits: LoRA on linear layers, embeddings and the output layer, of the language
model and of the vision tower; whole modules that were trained (`modules_to_save`); single trained tokens; a vocabulary
that was enlarged; a rank or scale of its own for some modules; DoRA's magnitudes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from icons.models.lora import LLAVA_TARGETS, SHOWN, adapter_file, read_adapter_config, wrap
from icons.models.parameter_names import WRAPPERS, known_name
from icons.models.tensor_files import read_tensors
from icons.terminal import counted

_PREFIX = "base_model.model."
_LORA_A = re.compile(r"\.lora_(?:embedding_)?A(?:\.|$)")
# what is not a module of the base model, but of PEFT's layer around it
_INNER = re.compile(r"\.(?:lora_\w+|base_layer|token_adapter)(?:\..*)?$")
_VOCABULARY = ("base_layer.weight", "lora_embedding_A", "embed_tokens.weight", "lm_head.weight")


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """Wraps exactly the modules that the adapter in `folder` has weights for, and sets every one of them.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
        ValueError: it is not LoRA, belongs to another model, or a tensor could not be set: names it.
    """
    config = read_adapter_config(folder)
    saved = {WRAPPERS.sub("", name): value for name, value in read_tensors(adapter_file(folder)).items()}
    known = {name for name, _ in model.named_modules()}
    names = {name: _own_name(name, known) for name in saved}
    modules = {_module_of(names[name]): _module_of(name) for name in saved if _LORA_A.search(name)}
    if strange := sorted(set(modules) - known):
        raise ValueError(
            f"{folder}: the adapter has weights for {counted(len(strange), 'module')} that the model lacks, such as "
            f"{', '.join(strange[:SHOWN])}; expected the adapter of this very model: see its base_model_name_or_path"
        )
    if not modules:
        raise ValueError(
            f"{folder}: the adapter holds no LoRA tensor (got {counted(len(saved), 'other')}); expected lora_A, lora_B"
        )
    tensors = {names[name]: value for name, value in saved.items()}
    _resize_vocabulary(model, tensors)
    config.target_modules = _whole_targets(set(modules), known)
    _set_patterns(config, modules, folder)
    config.inference_mode = False
    wrapped = wrap(model, config)
    _set_tensors(wrapped, tensors, folder)
    return wrapped


def _own_name(name: str, known: set[str]) -> str:
    """What a saved tensor is called in a model with the `known` modules: as saved, or by today's name.

    >>> _own_name("base_model.model.model.layers.0.q_proj.lora_A.weight", {"model.language_model.layers.0.q_proj"})
    'base_model.model.model.language_model.layers.0.q_proj.lora_A.weight'
    """
    module = _module_of(name)
    return _PREFIX + known_name(module, known) + name.removeprefix(_PREFIX)[len(module) :]


def _module_of(name: str) -> str:
    """The base model's module that a saved tensor is of.

    >>> _module_of("base_model.model.x.q_proj.lora_A.weight"), _module_of("base_model.model.x.lm_head.weight")
    ('x.q_proj', 'x.lm_head')
    """
    inner = name.removeprefix(_PREFIX)
    return _INNER.sub("", inner) if _INNER.search(inner) else inner.rpartition(".")[0]


def _resize_vocabulary(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Gives the model as many tokens as the adapter was trained with."""
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    names = {name for name, module in model.named_modules() if any(module is layer for layer in layers)}
    sizes = {
        value.shape[name.endswith("lora_embedding_A")]
        for name, value in tensors.items()
        if name.endswith(_VOCABULARY) and _module_of(name) in names
    }
    if len(sizes) == 1 and len(layers[0].weight) not in sizes:
        model.resize_token_embeddings(sizes.pop(), mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.requires_grad_(False)


def _set_patterns(config: LoraConfig, modules: Mapping[str, str], folder: Path) -> None:
    """Ranks and scales of single modules, under the modules' names of today.

    Args:
        config: changed in place.
        modules: name today -> name as saved.
        folder: for messages.

    Raises:
        ValueError: a pattern is of no module.
    """
    for which in ("rank_pattern", "alpha_pattern"):
        pattern: dict[str, Any] = getattr(config, which) or {}
        patterns: dict[str, Any] = {}
        used = set()
        for name, saved in modules.items():
            # PEFT's own rule: the first key that is the end of the name
            key = next((key for key in pattern if any(_fits(key, each) for each in (saved, name))), None)
            if key is not None:
                patterns[f"^{re.escape(name)}"] = pattern[key]
                used.add(key)
        if unused := [key for key in pattern if key not in used]:
            raise ValueError(
                f"{folder}: {which} names {unused[0]}, and the adapter has no such module among its weights; expected "
                "the scale of a module that is there: mend adapter_config.json"
            )
        setattr(config, which, patterns)


def _fits(key: str, name: str) -> bool:
    pattern = WRAPPERS.sub("", key.removeprefix(_PREFIX))
    return re.match(rf"(?:.*\.)?(?:{pattern})$", name) is not None


def _whole_targets(modules: set[str], known: set[str]) -> str:
    """LLaVA's expression where it says the same as the list of names: shorter, and it reads as what it is."""
    llava = {name for name in known if re.fullmatch(LLAVA_TARGETS, name)}
    return LLAVA_TARGETS if modules == llava else "|".join(re.escape(name) for name in sorted(modules))


def _set_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: Path | str, adapter: str = "default") -> None:
    """Sets the adapter's tensors by name, and checks that every one found its place and no place was left out.

    Raises:
        ValueError: a tensor has no place, another shape, or a LoRA parameter got no tensor.
    """
    places: dict[str, Tensor] = dict(model.named_parameters())
    known, wanted = _trained_beside(model, adapter)
    unset = {name for name in places if "lora_" in name} | wanted
    for name, value in tensors.items():
        target = next((each for each in [known.get(name), *_spellings(name, adapter)] if each in places), None)
        if target is None:
            raise ValueError(
                f"{source}: the tensor {name} has no place in the model; expected an adapter of this model"
            )
        if places[target].shape != value.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(value.shape)}, the model's {tuple(places[target].shape)}; expected "
                "the same: is it the adapter of a model of another size?"
            )
        with torch.no_grad():
            places[target].copy_(value)
        unset.discard(target)
    if unset:
        raise ValueError(
            f"{source}: no tensor for {counted(len(unset), 'parameter')} of the adapter, such as {sorted(unset)[0]}; "
            "the file is incomplete: copy or download it again"
        )


def _spellings(name: str, adapter: str) -> list[str]:
    """Where PEFT may keep a saved tensor: as it is, under the adapter's name, or in a `modules_to_save` copy.

    >>> _spellings("base_model.model.x.lora_A.weight", "default")[1]
    'base_model.model.x.lora_A.default.weight'
    """
    module, _, last = name.rpartition(".")
    return [
        name,
        f"{module}.{adapter}.{last}",
        f"{name}.{adapter}",  # of an embedding, a parameter and no module
        f"{name}.{adapter}.weight",  # DoRA's magnitudes
        f"{module}.modules_to_save.{adapter}.{last}",
    ]


def _trained_beside(model: nn.Module, adapter: str) -> tuple[dict[str, str], set[str]]:
    """Where PEFT keeps what was trained beside LoRA (whole modules, single tokens): saved name -> place; and all
    places."""
    known = {
        f"{name}.{saved}": f"{name}.{target}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for saved, target in module.adapter_state_dict_load_map(adapter).items()
    }
    parameters = {name for name, _ in model.named_parameters()}
    return known, {target for target in known.values() if target in parameters}


def merge_into(weights: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights with the LoRA adapter in `folder` added: W + scale B A, computed in float32.

    For an adapter that is part of the model (xtuner's on the vision tower). Names are compared without what stands
    before the layers (`vision_model.`), which differs between versions.

    Raises:
        ValueError: the adapter has weights for a layer that is not there, or is DoRA.
    """
    config = read_adapter_config(folder)
    if config.use_dora:
        raise ValueError(f"{folder}: is DoRA (use_dora); expected plain LoRA on a vision tower, to be merged into it")
    merged = dict(weights)
    tensors = read_tensors(adapter_file(folder))
    for name in [name for name in tensors if ".lora_A." in name]:
        saved = _module_of(name)
        module = saved.removeprefix("vision_model.")
        target = next((key for key in weights if key.removeprefix("vision_model.") == f"{module}.weight"), None)
        if target is None:
            raise ValueError(
                f"{folder}: adapts {module}, which the vision tower lacks; expected an adapter of this tower"
            )
        rank = tensors[name].shape[0]
        own = [value for key, value in (config.alpha_pattern or {}).items() if _fits(key, saved)]
        alpha = own[0] if own else config.lora_alpha
        scale = alpha / (rank**0.5 if config.use_rslora else rank)
        delta = tensors[name.replace(".lora_A.", ".lora_B.")].float() @ tensors[name].float()
        merged[target] = (weights[target].float() + scale * delta).to(weights[target].dtype)
    return merged
