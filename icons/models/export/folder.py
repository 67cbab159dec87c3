"""Export: the adapter merged into the weights, as a Hugging Face folder or in LLaVA's original layout."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration

from icons.choices import Layout, WrittenDtype
from icons.models.base_weights import quiet
from icons.models.export.old_settings import old_rope, with_old_settings
from icons.models.export.processor import write_processor
from icons.models.folder import ModelFolder, read_config
from icons.models.llava import Llava
from icons.models.loading import MERGED, adapter_digest, load_model, merged_adapters
from icons.output import at_the_top, check_output, read_object, whole_folder

_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json")
_MULTIPLE = 64


def export_model(
    folder: ModelFolder,
    adapter: Path | None,
    out: Path,
    layout: Layout = "huggingface",
    dtype: WrittenDtype = "stored",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes the model with its adapter merged: W + scale B A, added in float32 and rounded once.

    `huggingface`: what transformers, vLLM and lmms-eval load. An original LLaVA has no image token in its vocabulary;
    as in Hugging Face's own conversion `<image>` and `<pad>` are appended and the vocabulary is padded to a multiple
    of 64. The added rows are the mean row, in the embedding and in the output layer: their logit is the mean logit,
    never the largest; the logits of the other tokens do not change.

    `llava`: what LLaVA's evaluation scripts load (`--model-path out`; the folder's name must contain `llava`). The
    vision tower is written to `out/vision_tower`, which the config names. A vocabulary that was extended for Hugging
    Face is cut back.

    Args:
        folder: the base model.
        adapter: LoRA folder; None exports the base model in the other layout.
        out: a new or empty folder.
        layout: see above.
        dtype: of the written weights.
        trust_remote_code: run code that comes with the base model.
        overwrite: write to `out` also if something lies there that is no former export; weights there are replaced.

    Raises:
        ValueError: `out` holds something, or is an input, or the layout does not fit the model.
    """
    inputs = {"--model": folder.model, "--vision-tower": folder.vision_tower, "--mm-projector": folder.mm_projector}
    inputs |= {"--adapter": adapter}
    check_output(out, kind="folder", inputs=inputs, ours=_is_export, overwrite=overwrite)
    if layout == "llava" and folder.kind != "llava":
        raise ValueError(f"{folder.model}: is no LLaVA ({folder.kind} model); expected --format huggingface for it")
    network = load_model(folder, adapter=adapter, dtype=dtype, trust_remote_code=trust_remote_code)
    model: Any = network
    if isinstance(network, PeftModel):
        model = network.merge_and_unload(safe_merge=True)
    model.to(model.get_input_embeddings().weight.dtype)
    record: dict[str, Any] = {
        "format": 1,
        "layout": layout,
        "base": folder.model.name,
        "base_fingerprint": folder.fingerprint(),
    }
    merged = merged_adapters(folder.model) + ([adapter_digest(adapter)] if adapter is not None else [])
    record |= {"adapters": merged}
    with whole_folder(out, last=MERGED, stale=partial(_is_stale, out)) as made:
        if layout == "llava":
            _write_llava(model, folder, made, home=out)
        else:
            _write_huggingface(model, folder, made, trust_remote_code)
        files = sorted(file.relative_to(made).as_posix() for file in made.rglob("*") if file.is_file())
        (made / MERGED).write_text(json.dumps(record | {"files": files}, indent=2) + "\n")


def _is_stale(out: Path, file: str) -> bool:
    """Whether a file must not stay where an export is written: a former one's, which another layout or model does not
    replace, or weights, which would be read with the new."""
    return file in read_object(out / MERGED).get("files", []) or (at_the_top(file) and file.endswith(_WEIGHT_SUFFIXES))


def _is_export(folder: Path) -> bool:
    return "layout" in read_object(folder / MERGED)


def _write_huggingface(model: Any, folder: ModelFolder, out: Path, trust_remote_code: bool) -> None:
    settings = model.generation_config
    if settings is not None and {settings.temperature, settings.top_p} - {None, 1.0}:
        settings.do_sample = True  # Vicuna's own settings, which transformers refuses to write otherwise
    if folder.layout == "huggingface":
        for file in folder.model.iterdir():
            rewritten = file.name in ("config.json", "generation_config.json", MERGED)
            if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and not rewritten:
                shutil.copyfile(file, out / file.name)
    if folder.kind == "llava":
        if folder.layout == "original":
            _add_image_token(model, folder, out, trust_remote_code)
        _write_llava_huggingface(model, folder, out)
    else:
        with quiet():
            model.save_pretrained(out)
        values = with_old_settings(json.loads((out / "config.json").read_text()))
        (out / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_llava_huggingface(model: Any, folder: ModelFolder, out: Path) -> None:
    """Weights and settings in the words of `llava-hf/*`, which transformers 4 and 5 and vLLM read alike."""
    weights = {_old_name(name): value.contiguous() for name, value in model.state_dict().items()}
    if model.config.text_config.tie_word_embeddings:
        weights.pop("language_model.lm_head.weight")
    save_torch_state_dict(weights, out, max_shard_size="5GB")
    model.__class__ = LlavaForConditionalGeneration
    values = model.config.to_dict() | {"architectures": ["LlavaForConditionalGeneration"]}
    text = model.config.text_config
    values["text_config"] |= {"model_type": "llama"} | _old_values(text)
    values["torch_dtype"] = values["text_config"]["torch_dtype"]
    for part in (values, values["text_config"], values["vision_config"]):
        part.pop("_name_or_path", None)
    (out / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out)


def _old_name(name: str) -> str:
    """What transformers 4 calls a LLaVA's weight.

    >>> _old_name("model.language_model.norm.weight"), _old_name("model.vision_tower.post_layernorm.bias")
    ('language_model.model.norm.weight', 'vision_tower.vision_model.post_layernorm.bias')
    """
    for new, old in _OLD_PREFIXES.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


_OLD_PREFIXES = {
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def _add_image_token(model: Any, folder: ModelFolder, out: Path, trust_remote_code: bool) -> None:
    """Extends tokenizer and vocabulary by `<image>` and `<pad>`, and writes the processor."""
    text = model.config.text_config
    image, pad = write_processor(folder, model.config, out, trust_remote_code)
    size = -(-max(text.vocab_size, pad + 1) // _MULTIPLE) * _MULTIPLE
    table = model.get_input_embeddings()
    table.weight = nn.Parameter(with_mean_rows(table.weight.detach(), size))
    table.num_embeddings = size
    tied = text.tie_word_embeddings
    output = table.weight if tied else nn.Parameter(with_mean_rows(model.lm_head.weight.detach(), size))
    model.lm_head.weight = output
    model.lm_head.out_features = size
    text.vocab_size, text.pad_token_id = size, pad
    model.config.image_token_index = image
    model.generation_config.pad_token_id = pad


def with_mean_rows(weight: Tensor, size: int) -> Tensor:
    """`weight` with its mean row appended until it has `size` rows.

    >>> with_mean_rows(torch.tensor([[1.0], [3.0]]), 3).tolist()
    [[1.0], [3.0], [2.0]]
    """
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(size - len(weight), -1)])


def _write_llava(model: Llava, folder: ModelFolder, out: Path, home: Path) -> None:
    """LLaVA's own layout in `out`, which will lie at `home`: the config names the vision tower there."""
    core: Any = model.model
    config: Any = model.config
    text = config.text_config
    size = text.vocab_size
    if folder.layout == "huggingface" and size - _MULTIPLE <= config.image_token_index < size:
        size = config.image_token_index  # what follows was added for Hugging Face: <image>, <pad>, padding
    weights = {f"model.{name}": value for name, value in core.language_model.state_dict().items()}
    weights["lm_head.weight"] = model.lm_head.weight.detach()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:size].clone()
    for old, new in (("linear_1", "0"), ("linear_2", "2")):
        for name, value in getattr(core.multi_modal_projector, old).state_dict().items():
            weights[f"model.mm_projector.{new}.{name}"] = value
    save_torch_state_dict({name: value.contiguous() for name, value in weights.items()}, out, max_shard_size="5GB")
    core.vision_tower.config.architectures = ["CLIPVisionModel"]
    with quiet():
        core.vision_tower.save_pretrained(out / "vision_tower")
        processor = folder.image_processor
        assert processor is not None
        CLIPImageProcessorPil.from_pretrained(processor, trust_remote_code=False).save_pretrained(out / "vision_tower")
    values = _language_values(folder, text) | _llava_values(folder, config, home) | {"vocab_size": size}
    values["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    if (values.get("pad_token_id") or 0) >= size:
        values["pad_token_id"] = 0  # LLaVA pads with <unk>
    (out / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    for name in (*_TOKENIZER_FILES, "generation_config.json"):
        if (folder.model / name).is_file():
            shutil.copyfile(folder.model / name, out / name)


def _language_values(folder: ModelFolder, text: Any) -> dict[str, Any]:
    """The language model's settings, in the words of the transformers 4 that LLaVA runs on."""
    if folder.layout == "original":
        return read_config(folder.model)
    values = {name: value for name, value in text.to_dict().items() if name not in ("_name_or_path", "model_type")}
    for name in ("rope_parameters", "dtype"):
        values.pop(name, None)
    return values | _old_values(text)


def _old_values(text: Any) -> dict[str, Any]:
    """Settings of a language model that transformers 4 has under other names."""
    dtype = str(text.dtype or "float32").removeprefix("torch.")
    return old_rope(getattr(text, "rope_parameters", None) or {}) | {"torch_dtype": dtype}


def _llava_values(folder: ModelFolder, config: Any, home: Path) -> dict[str, Any]:
    whole = config.vision_feature_select_strategy == "full"
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": str((home / "vision_tower").resolve()),
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch" if whole else "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": folder.image_aspect_ratio,
        "tokenizer_model_max_length": folder.max_length,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
