"""load_model: any supported folder as one PyTorch model, with its adapter, ready to be trained or differentiated."""

import hashlib
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from icons.choices import Attention, ModelDtype, Quantize, Target, WrittenDtype
from icons.gradients.packing import keep_unpacked
from icons.models.base_weights import AUTO, PROJECTOR, language_config, load_huggingface, load_original
from icons.models.folder import ModelFolder, own_code
from icons.models.llava import Llava, assemble
from icons.models.lora import NON_LORA, LoraSettings, adapter_file, add_lora, non_lora_tensors
from icons.models.parameter_names import current_name
from icons.models.saved_adapter import load_adapter

MERGED = "icons_export.json"
NEVER_QUANTIZED = ["lm_head", r".*vision_tower", r".*vision_model", r".*visual", r".*multi_modal_projector"]
"""Matched from a module's whole name's start to a dot: LLaVA's tower lies under `model.` in Hugging Face's layout."""

Dtype: TypeAlias = ModelDtype | WrittenDtype


def load_model(
    folder: ModelFolder,
    *,
    adapter: Path | None = None,
    lora: LoraSettings | None = None,
    dtype: Dtype = "float32",
    attention: Attention = "sdpa",
    quantize: Quantize | None = None,
    gradient_checkpointing: bool = False,
    target: Target = "lora",
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model with its adapter, on the CPU, in eval mode; what is not to be trained is frozen.

    A batch for a LLaVA has its images expanded already: `folder.image_tokens` copies of `folder.image_token_id`.

    Args:
        folder: see `ModelFolder.open`.
        adapter: LoRA folder: PEFT's, LLaVA's, a warm-up's, or a `checkpoint-N` of the Hugging Face Trainer.
        lora: wrap the model in a fresh adapter instead.
        dtype: of the frozen weights; `auto`: bfloat16 on a GPU machine, else as stored, with float16 widened to float32
            (a CPU computes it no faster, and less exactly); `stored`: as stored. What is trained is float32 always.
        attention: kernel, of tower and language model.
        quantize: the language model's linear layers in 4 or 8 bits.
        gradient_checkpointing: recompute activations in the backward pass, in eval mode too (dropout stays off).
        target: `lora`: the adapter alone gets gradients; `trainable`: all that LLaVA trains, the projector too.
        trust_remote_code: run code that comes with the folder (generic models only).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: weights are missing or do not fit, the adapter is already merged into the model, or a package for
            what is asked is not installed.
    """
    if adapter is not None and lora is not None:
        raise ValueError("load_model: got both an adapter and settings for a fresh one; give one of them")
    _check_attention(attention)
    options: dict[str, Any] = {"attn_implementation": attention, "quantization_config": _quantization(quantize, dtype)}
    if adapter is not None:
        _refuse_merged(folder.model, adapter)
    widened = dtype == "auto" and quantize is None and not torch.cuda.is_available()
    if folder.layout == "original":
        model = load_original(folder, adapter, torch_dtype(dtype), options, widened=widened)
    else:
        # said in so many words: by default transformers asks, and waits, where there is a terminal
        options["trust_remote_code"] = trust_remote_code
        model = load_huggingface(folder, torch_dtype(dtype), options, widened=widened)
    keep_unpacked(model)
    return _prepare(model, folder, adapter, lora, target, gradient_checkpointing)


def empty_model(
    folder: ModelFolder,
    *,
    lora: LoraSettings | None = None,
    target: Target = "lora",
    trust_remote_code: bool = False,
) -> nn.Module:
    """The same model without weights, on the meta device: for counting parameters and planning."""
    with torch.device("meta"):
        if folder.layout == "original":
            assert folder.vision_tower is not None
            tower = CLIPVisionModel(CLIPVisionConfig.from_pretrained(folder.vision_tower, trust_remote_code=False))
            model: Any = assemble(
                LlamaForCausalLM(language_config(folder)), tower, folder.select_layer, folder.select_feature
            )
        else:
            with own_code(folder.model):
                config = AutoConfig.from_pretrained(folder.model, trust_remote_code=trust_remote_code)
            if folder.kind == "llava":
                model = LlavaForConditionalGeneration(config)
            else:
                model = AUTO[folder.kind].from_config(config, trust_remote_code=trust_remote_code)
        return _prepare(model, folder, None, lora, target, gradient_checkpointing=False)


def _prepare(
    model: Any,
    folder: ModelFolder,
    adapter: Path | None,
    lora: LoraSettings | None,
    target: Target,
    gradient_checkpointing: bool,
) -> nn.Module:
    """From a base model to what is trained: merge, adapter, frozen rest."""
    if folder.kind == "llava":
        assert folder.image_token_id is not None
        model = Llava.of(model, folder.image_token_id)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if adapter is not None:
        _set_non_lora(model, adapter)
        model = load_adapter(model, adapter)
    elif lora is not None:
        model = add_lora(model, lora)
    choose_trainable(model, target)
    if gradient_checkpointing:
        checkpoint_layers(model)
    return model.eval()


def choose_trainable(model: nn.Module, target: Target) -> None:
    """Sets `requires_grad`; what gets it becomes float32, since small steps vanish in a half."""
    for name, parameter in model.named_parameters():
        chosen = "lora_" in name
        if target == "trainable":
            chosen |= PROJECTOR in name or "modules_to_save." in name
        chosen &= ".original_module." not in name
        parameter.requires_grad_(chosen)
        if chosen:
            parameter.data = parameter.data.float()


def checkpoint_layers(model: Any) -> None:
    """Gradient checkpointing that also works in eval mode.

    transformers recomputes a layer only while its `training` flag is set, and in training mode dropout would change the
    gradients: so the flag of the layers alone is kept set, whatever `train` and `eval` do to the rest.
    """
    with warnings.catch_warnings():
        # the name in transformers 4; 5 has another beside it
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable", category=FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.train = AlwaysTraining(layer)  # type: ignore[assignment]
            layer.training = True


class AlwaysTraining:
    """In place of a layer's `train`: its children follow, its own flag stays set."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, mode: bool = True) -> nn.Module:
        for child in self.layer.children():
            child.train(mode)
        self.layer.training = True
        return self.layer


def _set_non_lora(model: Any, adapter: Path) -> None:
    """Sets the projector (and whatever else was trained) by name.

    Raises:
        ValueError: a tensor has no place in the model, or another shape.

    Warns:
        UserWarning: a LLaVA adapter comes without its projector.
    """
    tensors = non_lora_tensors(adapter)
    places = dict(model.named_parameters())
    for saved, value in tensors.items():
        name = saved.removeprefix("base_model.model.")
        name = name if name in places else current_name(name)
        if name not in places or places[name].shape != value.shape:
            has = (
                f"there it has shape {tuple(places[name].shape)}"
                if name in places
                else "the model has no such parameter"
            )
            raise ValueError(
                f"{adapter}: {saved} of shape {tuple(value.shape)}: {has}; expected an adapter of this model"
            )
        with torch.no_grad():
            places[name].copy_(value)
    # in LLaVA's checkpoint-N the projector is missing; Hugging Face adapters are complete without
    original = not (adapter / "icons.json").is_file() and getattr(model, "image_token", 0) < 0
    if original and not any(PROJECTOR in current_name(name) for name in tensors):
        warnings.warn(
            f"{adapter}: has no projector ({NON_LORA[1]}), though LLaVA trains it with the adapter; the pretrained "
            "one is used, which is NOT the trained model's: give the finished folder, or one with its DeepSpeed state",
            UserWarning,
            stacklevel=2,
        )


def _check_attention(attention: str) -> None:
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "attention flash_attention_2: flash-attn is not installed; install the extra: pip install "
            "'icons-lightning[flash]', or use sdpa"
        )


def _quantization(quantize: str | None, dtype: Dtype) -> BitsAndBytesConfig | None:
    if quantize is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantize {quantize}: bitsandbytes is not installed; install the extra: pip install "
            "'icons-lightning[quantize]'"
        )
    compute = torch_dtype(dtype)
    return BitsAndBytesConfig(
        load_in_4bit=quantize == "4bit",
        load_in_8bit=quantize == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute if isinstance(compute, torch.dtype) else torch.bfloat16,
        llm_int8_skip_modules=NEVER_QUANTIZED,
    )


def torch_dtype(dtype: Dtype) -> torch.dtype | str:
    """What transformers' `dtype` argument takes."""
    if dtype == "stored" or (dtype == "auto" and not torch.cuda.is_available()):
        return "auto"
    return torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)


def _refuse_merged(model: Path, adapter: Path) -> None:
    """An adapter that `icons export` has merged into this very model must not be applied again."""
    if adapter_digest(adapter) in merged_adapters(model):
        raise ValueError(
            f"{adapter}: is merged into {model} already (see {MERGED}); applying it again would count it twice: leave "
            "--adapter out, or give the base model"
        )


def merged_adapters(model: Path) -> list[str]:
    """Fingerprints of the adapters that `icons export` has merged into a model."""
    record = model / MERGED
    return json.loads(record.read_text())["adapters"] if record.is_file() else []


def adapter_digest(adapter: Path) -> str:
    """SHA-256 (16 hex digits) of the adapter's weights as they lie on disk."""
    with adapter_file(adapter).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
