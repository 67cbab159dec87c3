"""Base models: their weights read in either layout, checked to be whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)
from transformers.utils import logging

from icons.models.folder import ModelFolder, own_code, read_config
from icons.models.llava import assemble
from icons.models.lora import non_lora_tensors
from icons.models.parameter_names import current_name
from icons.models.saved_adapter import merge_into
from icons.models.tensor_files import find_tensors, read_tensors, readable
from icons.terminal import counted

PROJECTOR = "model.multi_modal_projector."
AUTO: dict[str, Any] = {
    "text": AutoModelForCausalLM,
    "image-text": AutoModelForImageTextToText,
    "llava": LlavaForConditionalGeneration,
}
_LANGUAGE_KINDS = ("llama", "llava", "llava_llama")
_SHOWN = 3


def load_huggingface(
    folder: ModelFolder, dtype: torch.dtype | str, options: dict[str, Any], *, widened: bool = False
) -> Any:
    """The model; with `widened`, float16 weights as float32."""
    with quiet(), own_code(folder.model):
        model = pretrained(AUTO[folder.kind], folder.model, dtype=dtype, **options)
    if widened:
        widen(model)
    return model


def load_original(
    folder: ModelFolder,
    adapter: Path | None,
    dtype: torch.dtype | str,
    options: dict[str, Any],
    *,
    widened: bool = False,
) -> Any:
    """LLaVA's own layout: language model, vision tower and projector, each from its place, in the language model's
    number format; with `widened`, float32 in place of float16."""
    tower_folder = folder.vision_tower
    assert tower_folder is not None
    with quiet():
        config = language_config(folder)
        language = pretrained(LlamaForCausalLM, folder.model, config=config, dtype=dtype, **options)
        if widened:
            widen(language)
        tower = _load_tower(folder, tower_folder, language.dtype, options["attn_implementation"])
    model = assemble(language, tower, folder.select_layer, folder.select_feature)
    projector = _projector_tensors(folder, adapter)
    module: Any = model.model.multi_modal_projector
    expected = module.state_dict()
    if set(projector) != set(expected):
        raise ValueError(
            f"{folder.mm_projector or folder.model}: the projector needs {', '.join(expected)}; got "
            f"{', '.join(projector) or 'none of them'}: give --mm-projector, LLaVA's mm_projector.bin for this model"
        )
    for name, value in projector.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{folder.mm_projector}: {name} has shape {tuple(value.shape)}, expected "
                f"{tuple(expected[name].shape)}: it is the projector of a model of another size"
            )
    module.load_state_dict({name: value.to(language.dtype) for name, value in projector.items()}, assign=True)
    return model


def widen(model: nn.Module) -> None:
    """Makes float16 weights and buffers float32, where they are; a model that is stored quantized stays as it is."""
    if getattr(model, "is_quantized", False):
        return
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float16:
            tensor.data = tensor.data.float()


def language_config(folder: ModelFolder) -> LlamaConfig:
    values = read_config(folder.model)
    if values.get("model_type") not in _LANGUAGE_KINDS or "hidden_size" not in values:
        raise ValueError(
            f"{folder.model}: model_type is {values.get('model_type')!r}; in LLaVA's original layout only Llama and "
            "Vicuna are supported: use a model in the Hugging Face layout"
        )
    kept = {name: value for name, value in values.items() if not name.startswith("mm_")}
    return LlamaConfig.from_dict(kept | {"model_type": "llama"})


def _load_tower(folder: ModelFolder, tower_folder: Path, dtype: torch.dtype, attention: str) -> Any:
    """CLIP's vision part; weights of a tuned tower lie in the model's folder, and go before the tower's own."""
    kind = read_config(tower_folder).get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"{tower_folder}: model_type is {kind!r}; expected a CLIP folder, as LLaVA-1.5's tower is")
    tower = pretrained(CLIPVisionModel, tower_folder, dtype=dtype, attn_implementation=attention)
    tuned = {
        name.partition(".vision_tower.vision_tower.")[2].removeprefix("vision_model."): value.to(dtype)
        for name, value in find_tensors(folder.model, lambda name: ".vision_tower.vision_tower." in name).items()
        if not name.endswith("position_ids")
    }
    if tuned:
        missing = set(tower.state_dict()) - set(tuned)
        if missing:
            raise ValueError(f"{folder.model}: its vision tower lacks {sorted(missing)[0]}; download the folder again")
        tower.load_state_dict(tuned)
    if folder.tower_adapter is not None:
        tower.load_state_dict(merge_into(tower.state_dict(), folder.tower_adapter))
    return tower


def _projector_tensors(folder: ModelFolder, adapter: Path | None) -> dict[str, Tensor]:
    """The pretrained projector; where there is none, that of the adapter (which is set again with the adapter)."""
    if folder.mm_projector is not None:
        tensors = read_tensors(folder.mm_projector)
        # xtuner's file has the projector alone, as `model.0.weight`
        xtuner = {f"mm_projector.{name.removeprefix('model.')}": value for name, value in tensors.items()}
        tensors = tensors if any("mm_projector." in name for name in tensors) else xtuner
        tensors = {f"mm_projector.{name.rpartition('mm_projector.')[2]}": value for name, value in tensors.items()}
    else:
        tensors = find_tensors(folder.model, lambda name: "mm_projector." in name)
        if not tensors and adapter is not None:
            tensors = non_lora_tensors(adapter)
    named = {current_name(name).removeprefix("base_model.model."): value for name, value in tensors.items()}
    return {name.removeprefix(PROJECTOR): value for name, value in named.items() if name.startswith(PROJECTOR)}


def pretrained(kind: Any, folder: Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """`kind.from_pretrained`, but weights that transformers would make up are refused, and the attention kernel is the
    one that was asked for, whatever the folder's config.json names."""
    with own_code(folder), readable(folder, "a model, or its weights do not fit its config.json"):
        config = options.pop("config", None) or _config_of(kind, folder, trust_remote_code)
        _set_kernel(config, options["attn_implementation"])
        model, info = kind.from_pretrained(
            folder, config=config, output_loading_info=True, trust_remote_code=trust_remote_code, **options
        )
    made_up = sorted(info["missing_keys"])
    if made_up:
        raise ValueError(
            f"{folder}: has no weights for {counted(len(made_up), 'parameter')}, such as "
            f"{', '.join(made_up[:_SHOWN])}; the folder is incomplete or of another kind of model: download it again"
        )
    return model


def _config_of(kind: Any, folder: Path, trust_remote_code: bool) -> Any:
    """The config that `kind.from_pretrained` would read by itself."""
    own = getattr(kind, "config_class", None)
    if own is None:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return own.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _set_kernel(config: Any, kernel: str) -> None:
    """Sets the attention kernel of a config and of all inside it: transformers lets a saved one win."""
    config._attn_implementation = kernel
    for name in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, name, None)) is not None:
            _set_kernel(inner, kernel)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars, and its table of weights that are not needed (a CLIP's text part)."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
