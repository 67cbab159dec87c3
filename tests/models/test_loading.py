"""Every kind of folder loads as one model: complete, with LoRA once, in the dtype and with the kernel asked for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from icons.batch import model_inputs, sample_losses
from icons.models.adam_state import load_adam_state
from icons.models.folder import ModelFolder
from icons.models.loading import (
    MERGED,
    NEVER_QUANTIZED,
    adapter_digest,
    checkpoint_layers,
    empty_model,
    load_model,
)
from icons.models.lora import LoraSettings

Batches = Callable[..., dict[str, Any]]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocabulary", "lora", "base", "projector"),
    [
        (4096, 11008, 32, 32, 32, 32000, 319_815_680, 7_062_902_784, 20_979_712),
        (5120, 13824, 40, 40, 40, 32000, 500_695_040, 13_350_839_296, 31_467_520),
        (4096, 14336, 32, 32, 8, 128256, 335_544_320, 8_354_748_416, 20_979_712),
    ],
    ids=["vicuna-7b", "vicuna-13b", "llama-3-8b"],
)
def test_parameter_counts_of_the_real_models(
    tmp_path: Path, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int,
    lora: int, base: int, projector: int,
) -> None:  # fmt: skip
    language = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
    }  # fmt: skip
    clip = {
        "model_type": "clip", "projection_dim": 768,
        "vision_config": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 336, "patch_size": 14, "projection_dim": 768, "model_type": "clip_vision_model",
        },
    }  # fmt: skip
    for name, config in (("language", language), ("clip", clip)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "mm_projector.bin").touch()
    folder = ModelFolder.open(tmp_path / "language", tmp_path / "clip", tmp_path / "mm_projector.bin")
    model = empty_model(folder, lora=LoraSettings(rank=128), target="lora")
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(parameter.numel() for parameter in trainable(model).values()) == lora
    assert len(trainable(model)) == 7 * 2 * layers
    assert not any("vision_tower" in name for name in trainable(model))
    assert sum(count for name, count in counts.items() if "lora_" not in name) == base
    assert sum(count for name, count in counts.items() if "multi_modal_projector" in name) == projector
    assert (
        sum(
            parameter.numel()
            for parameter in trainable(empty_model(folder, lora=LoraSettings(), target="trainable")).values()
        )
        == lora + projector
    )
    assert folder.image_tokens == 576
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_lora_is_applied_once(llava: ModelFolder, adapter: Path, original: Path) -> None:
    """The weight inside each LoRA layer is the base model's, and A and B are the adapter's."""
    model = load_model(llava, adapter=adapter)
    named = dict(model.named_parameters())
    base, saved = (
        load_file(original / "vicuna-tiny" / "model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    for name, value in saved.items():
        own = name.replace("model.model.model.layers", "model.model.model.language_model.layers")
        assert torch.equal(named[own.replace(".weight", ".default.weight")], value)
        if "lora_A" in name:
            module = own.partition(".lora_A")[0]
            key = name.partition(".lora_A")[0].removeprefix("base_model.model.") + ".weight"
            assert torch.equal(named[f"{module}.base_layer.weight"], base[key])
    assert len(trainable(model)) == len(saved) == 28


def test_target_trainable_adds_the_projector_only(llava: ModelFolder, adapter: Path) -> None:
    lora = set(trainable(load_model(llava, adapter=adapter)))
    both = set(trainable(load_model(llava, adapter=adapter, target="trainable")))
    assert both - lora == {
        f"base_model.model.model.multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")
    }
    assert lora < both


def test_the_adapters_own_projector_goes_before_the_pretrained_one(
    llava: ModelFolder, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "lora")
    trained = torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    trained = {name: value + 1 for name, value in trained.items()}
    torch.save(trained, tmp_path / "lora" / "non_lora_trainables.bin")
    named = dict(load_model(llava, adapter=tmp_path / "lora").named_parameters())
    own = named["base_model.model.model.multi_modal_projector.linear_1.weight"]
    assert torch.equal(own, trained["base_model.model.model.mm_projector.0.weight"])


def test_an_adapter_folder_tells_what_the_base_folder_does_not(
    original: Path, adapter: Path, make_batch: Batches
) -> None:
    """No --vision-tower, no --mm-projector: the LLaVA LoRA folder's config and weights have both."""
    short = ModelFolder.open(original / "vicuna-tiny", vision_tower=original / "clip", adapter=adapter)
    assert short.mm_projector is None
    batch = make_batch([0, 2])
    whole = ModelFolder.open(original / "vicuna-tiny", original / "clip", original / "mm_projector.bin")
    logits = [load_model(folder, adapter=adapter)(**model_inputs(batch)).logits for folder in (short, whole)]
    assert torch.equal(*logits)
    by_config = ModelFolder.open(original / "vicuna-tiny", adapter=adapter)  # `clip` lies beside the base folder
    assert by_config.vision_tower == original.resolve() / "clip"


def test_a_checkpoint_without_projector_warns(llava: ModelFolder, adapter: Path, tmp_path: Path) -> None:
    """An HF-Trainer checkpoint-N of LLaVA: no config.json, no non_lora_trainables.bin."""
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, checkpoint / name)
    with pytest.warns(UserWarning, match="has no projector .* NOT the trained model's"):
        model = load_model(llava, adapter=checkpoint)
    assert len(trainable(model)) == 28
    shutil.copyfile(adapter / "config.json", checkpoint.parent / "config.json")
    found = ModelFolder.open(llava.model, llava.vision_tower, llava.mm_projector, adapter=checkpoint)
    assert found.image_aspect_ratio == "pad"


def test_adapter_as_pytorch_file_gives_the_same_model(
    llava: ModelFolder, adapter: Path, tmp_path: Path, make_batch: Batches
) -> None:
    for name in ("adapter_config.json", "non_lora_trainables.bin"):
        shutil.copyfile(adapter / name, tmp_path / name)
    torch.save(load_file(adapter / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    batch = model_inputs(make_batch([0, 1]))
    assert torch.equal(
        load_model(llava, adapter=adapter)(**batch).logits, load_model(llava, adapter=tmp_path)(**batch).logits
    )


def test_refuses_an_adapter_that_is_merged_already(llava: ModelFolder, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(llava.model, tmp_path / "merged")
    (tmp_path / "merged" / MERGED).write_text(json.dumps({"adapters": [adapter_digest(adapter)]}))
    merged = ModelFolder.open(tmp_path / "merged", llava.vision_tower, llava.mm_projector)
    with pytest.raises(ValueError, match=r"is merged into .* already .* count it twice"):
        load_model(merged, adapter=adapter)


def test_refuses_two_adapters(llava: ModelFolder, adapter: Path) -> None:
    with pytest.raises(ValueError, match="both an adapter and settings for a fresh one"):
        load_model(llava, adapter=adapter, lora=LoraSettings())


def test_refuses_non_lora_tensors_without_a_place(llava: ModelFolder, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "lora")
    torch.save(
        {"base_model.model.model.embed_tokens.weight": torch.zeros(3, 2)}, tmp_path / "lora" / "non_lora_trainables.bin"
    )
    with pytest.raises(ValueError, match=r"embed_tokens.weight of shape \(3, 2\): there it has shape \(620, 32\)"):
        load_model(llava, adapter=tmp_path / "lora")


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")]
)
def test_weights_have_the_dtype_asked_for_and_trained_ones_float32(
    llava: ModelFolder, adapter: Path, make_batch: Batches, dtype: Any, stored: str
) -> None:
    model = load_model(llava, adapter=adapter, dtype=dtype, target="trainable")
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else getattr(torch, stored))
    batch = make_batch([0, 1])
    sample_losses(model(**model_inputs(batch)).logits, batch["labels"]).sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(model).values())


@pytest.mark.parametrize(
    ("stored", "auto"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=["bfloat16", "float16"]
)
def test_dtype_auto_on_a_cpu_is_the_stored_one_but_for_float16_which_is_widened(
    huggingface_llava: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, auto: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    weights = load_file(huggingface_llava / "model.safetensors")
    narrow = {name: value.to(stored) for name, value in weights.items()}
    save_file(narrow, huggingface_llava / "model.safetensors", {"format": "pt"})
    config = json.loads((huggingface_llava / "config.json").read_text())
    (huggingface_llava / "config.json").write_text(json.dumps(config | {"dtype": str(stored)[len("torch.") :]}))
    found = {}
    for dtype in ("auto", "stored"):
        model = load_model(ModelFolder.open(huggingface_llava), dtype=dtype)
        found[dtype] = {parameter.dtype for parameter in model.parameters()}
    assert found == {"auto": {auto}, "stored": {stored}}


def test_parts_that_are_stored_wider_than_a_float16_language_model_keep_their_bits(
    llava: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    language = tmp_path / "vicuna"
    shutil.copytree(llava.model, language)
    half = {name: value.half() for name, value in load_file(language / "model.safetensors").items()}
    save_file(half, language / "model.safetensors", {"format": "pt"})
    config = json.loads((language / "config.json").read_text())
    (language / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    model = load_model(ModelFolder.open(language, llava.vision_tower, llava.mm_projector), dtype="auto")
    expected = load_model(llava, dtype="float32").state_dict()
    kept = [name for name in expected if "vision_tower" in name or "projector" in name]
    assert kept and all(torch.equal(model.state_dict()[name], expected[name]) for name in kept)
    assert all(
        torch.equal(value, expected[name].half().float())
        for name, value in model.state_dict().items()
        if name not in kept
    )


def test_missing_packages_are_named_with_their_extra(llava: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ValueError, match=r"flash-attn is not installed; .*icons-lightning\[flash\]"):
        load_model(llava, attention="flash_attention_2")
    with pytest.raises(ValueError, match=r"bitsandbytes is not installed; .*icons-lightning\[quantize\]"):
        load_model(llava, quantize="4bit")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_kernel_is_the_one_asked_for(llava: ModelFolder, huggingface_llava: Path, attention: Any) -> None:
    for folder in (llava, ModelFolder.open(huggingface_llava)):
        model: Any = load_model(folder, attention=attention)
        for part in (model.model.language_model, model.model.vision_tower):
            kernels = {module.config._attn_implementation for module in part.modules() if hasattr(module, "config")}
            assert kernels == {attention}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_recomputes_in_eval_and_changes_no_gradient(
    llava: ModelFolder, adapter: Path, make_batch: Batches
) -> None:
    batch, found = make_batch([0, 1]), {}
    for checkpointing in (False, True):
        model = load_model(llava, adapter=adapter, gradient_checkpointing=checkpointing).train().eval()
        calls = []
        layer = next(module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer")
        layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))  # type: ignore[union-attr]
        assert all(
            not module.training or (checkpointing and isinstance(module, GradientCheckpointingLayer))
            for module in model.modules()
        )
        sample_losses(model(**model_inputs(batch), use_cache=False).logits, batch["labels"]).sum().backward()
        assert len(calls) == 1 + checkpointing
        found[checkpointing] = {name: parameter.grad for name, parameter in trainable(model).items()}
    for name, gradient in found[False].items():
        assert gradient is not None
        torch.testing.assert_close(found[True][name], gradient, atol=0, rtol=0)


def test_layers_of_a_model_in_eval_mode_are_checkpointed_at_once(llava: ModelFolder, adapter: Path) -> None:
    model = load_model(llava, adapter=adapter).eval()
    checkpoint_layers(model)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers and all(layer.training for layer in layers)
    assert not any(module.training for layer in layers for module in layer.children())


def test_fresh_lora_is_the_same_for_a_seed(llava: ModelFolder) -> None:
    models = [trainable(load_model(llava, lora=LoraSettings(rank=4, seed=seed))) for seed in (0, 0, 1)]
    name = next(name for name in models[0] if "lora_A" in name)
    assert torch.equal(models[0][name], models[1][name])
    assert not torch.equal(models[0][name], models[2][name])


def test_huggingface_llava_with_fresh_lora(huggingface_llava: Path) -> None:
    folder = ModelFolder.open(huggingface_llava)
    assert (folder.layout, folder.kind, folder.image_token_id, folder.image_tokens) == ("huggingface", "llava", 99, 4)
    model = load_model(folder, lora=LoraSettings(rank=2), target="trainable")
    assert len(trainable(model)) == 28 + 4


def test_generic_text_models_get_lora_inside_their_decoder(tmp_path: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "llama")
    gpt2 = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    for name, modules in (("llama", 7), ("gpt2", 4)):
        folder = ModelFolder.open(tmp_path / name)
        assert folder.kind == "text"
        model = load_model(folder, lora=LoraSettings(rank=2))
        assert len(trainable(model)) == 2 * modules, list(trainable(model))
        assert not any("lm_head" in part for part in trainable(model))
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 50)


def test_generic_image_text_models_get_lora_outside_their_tower(tmp_path: Path) -> None:
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={"depth": 1, "embed_dim": 8, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2},
        image_token_id=59, video_token_id=58, vision_start_token_id=57, vision_end_token_id=56,
    )  # fmt: skip
    Qwen2VLForConditionalGeneration(config).save_pretrained(tmp_path / "qwen")
    folder = ModelFolder.open(tmp_path / "qwen")
    assert (folder.kind, folder.image_token_id, folder.template) == ("image-text", 59, "chat")
    model = load_model(folder, lora=LoraSettings(rank=2))
    assert len(trainable(model)) == 14
    assert not any("visual" in name for name in trainable(model))


def test_the_projector_of_a_checkpoint_comes_from_its_deepspeed_state(
    llava: ModelFolder, adapter: Path, tmp_path: Path
) -> None:
    """An HF-Trainer checkpoint-N of LLaVA trained with DeepSpeed: the trained projector is in `global_stepN` alone."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, tmp_path / name)
    lora = {
        name.replace(".weight", ".default.weight"): value
        for name, value in load_file(adapter / "adapter_model.safetensors").items()
    }
    projector = torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    groups = [lora, {name: value + 1 for name, value in projector.items()}]
    flat = [torch.cat([value.flatten() for value in group.values()]) for group in groups]
    moments = {i: {"step": 3, "exp_avg": value, "exp_avg_sq": value.abs()} for i, value in enumerate(flat)}
    settings = [{"params": [i], "betas": (0.9, 0.999), "eps": 1e-8} for i in range(2)]
    folder = tmp_path / "global_step3"
    folder.mkdir()
    (tmp_path / "latest").write_text("global_step3")
    state = {
        "zero_stage": 2, "partition_count": [1, 1], "group_paddings": [0, 0], "single_partition_of_fp32_groups": flat,
        "base_optimizer_state": {"state": moments, "param_groups": settings},
    }  # fmt: skip
    torch.save({"optimizer_state_dict": state}, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    shapes = [{name: value.shape for name, value in group.items()} for group in groups]
    torch.save({"param_shapes": shapes}, folder / "mp_rank_00_model_states.pt")
    model = load_model(llava, adapter=tmp_path, target="trainable")
    own = dict(model.named_parameters())["base_model.model.model.multi_modal_projector.linear_2.bias"]
    assert torch.equal(own, groups[1]["base_model.model.model.mm_projector.2.bias"])
    found = load_adam_state(tmp_path, model)
    for name, value in trainable(model).items():
        assert torch.equal(found.exp_avg[name], value)


@pytest.mark.parametrize(("quantize", "kind", "near"), [("4bit", "Linear4bit", 0.3), ("8bit", "Linear8bitLt", 0.05)])
def test_quantized_base_weights(
    llava: ModelFolder, adapter: Path, make_batch: Batches, quantize: Any, kind: str, near: float
) -> None:
    """The language model's linear layers only; the adapter still gets gradients."""
    pytest.importorskip("bitsandbytes", reason="the extra `quantize` is not installed")
    batch = model_inputs(make_batch([0]))
    model = load_model(llava, adapter=adapter, quantize=quantize, target="trainable")
    layers = {name for name, module in model.named_modules() if type(module).__name__ == kind}
    assert len(layers) == 14
    assert all("language_model.layers" in name for name in layers)
    logits = model(**batch).logits
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(model).values())
    whole = load_model(llava, adapter=adapter)(**batch).logits
    assert 0 < (logits - whole).norm() < near * whole.norm()


@pytest.mark.parametrize("tower", ["vision_tower", "model.vision_tower", "model.visual", "model.multi_modal_projector"])
def test_towers_and_projectors_stay_whole_under_any_name(tower: str) -> None:
    """transformers' own rule, which matches whole names, decides."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert not should_convert_module(f"{tower}.encoder.layers.0.self_attn.q_proj", NEVER_QUANTIZED)
    assert not should_convert_module("lm_head", NEVER_QUANTIZED)
    assert should_convert_module("model.language_model.layers.0.self_attn.q_proj", NEVER_QUANTIZED)
