"""What PEFT loads, we load, with equal logits; under older names too, where PEFT alone would not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from icons.gradients import per_sample_gradients
from icons.models.folder import ModelFolder
from icons.models.loading import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
TEXT = r".*language_model.*\.(q|v)_proj"
IDS = torch.tensor([[1, 5, 7, 99, 99, 99, 99, 8, 9]])
PIXELS = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
CASES: dict[str, dict[str, Any]] = {
    "a projector trained whole": {"target_modules": TEXT, "modules_to_save": ["multi_modal_projector"]},
    "an output layer trained whole": {"target_modules": TEXT, "modules_to_save": ["lm_head", "embed_tokens"]},
    "single tokens": {"target_modules": TEXT, "trainable_token_indices": {"embed_tokens": [3, 5]}},
    "LoRA on embedding and output": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "LoRA on the vision tower": {"target_modules": r".*(language_model|vision_tower).*\.q_proj"},
    "ranks and scales of their own": {
        "target_modules": TEXT,
        "rank_pattern": {"layers.0.self_attn.q_proj": 3, r"model\.language_model\.layers\.1\.self_attn\.v_proj": 4},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 32, "q_proj": 5},
    },
    "DoRA": {"target_modules": TEXT, "use_dora": True},
    "DoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "rank-stabilised": {"target_modules": TEXT, "use_rslora": True, "rank_pattern": {"v_proj": 4}},
}


def trained(base: Path, out: Path, case: dict[str, Any], vocabulary: int | None = None) -> Any:
    """PEFT's model with random adapter weights, saved to `out`."""
    model: Any = LlavaForConditionalGeneration.from_pretrained(base)
    if vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=7, task_type="CAUSAL_LM", **case))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    wrapped.eval().save_pretrained(out)
    return wrapped


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, pixel_values=PIXELS).logits


def rewrite(folder: Path, rename: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({rename(name): value.clone() for name, value in load_file(file).items()}, file)


def loaded(base: Path, adapter: Path) -> nn.Module:
    return load_model(ModelFolder.open(base), adapter=adapter, target="trainable")


@pytest.mark.parametrize("name", CASES)
def test_what_peft_loads_we_load(name: str, huggingface_llava: Path, tmp_path: Path) -> None:
    trained(huggingface_llava, tmp_path / "adapter", CASES[name])
    base = LlavaForConditionalGeneration.from_pretrained(huggingface_llava)
    oracle = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    plain = logits(LlavaForConditionalGeneration.from_pretrained(huggingface_llava).eval())
    found = logits(loaded(huggingface_llava, tmp_path / "adapter"))
    torch.testing.assert_close(found, logits(oracle), atol=1e-6, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-2, "the adapter does something"


@pytest.mark.parametrize("name", ["DoRA", "DoRA on the embedding"])
def test_gradients_of_dora_are_those_of_each_sample_alone(name: str, huggingface_llava: Path, tmp_path: Path) -> None:
    trained(huggingface_llava, tmp_path / "adapter", CASES[name])
    base = LlavaForConditionalGeneration.from_pretrained(huggingface_llava)
    oracle: Any = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    ids = torch.tensor([[1, 5, 7, 8, 9, 11], [1, 6, 3, 2, 4, 12]])
    labels = ids.clone()
    labels[:, :3] = -100
    wanted = {key: value for key, value in oracle.named_parameters() if value.requires_grad}
    rows = []
    for sample, label in zip(ids, labels, strict=True):
        loss = oracle(input_ids=sample[None], labels=label[None]).loss
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
        rows.append(dict(zip(wanted, found, strict=True)))
    model: Any = load_model(ModelFolder.open(huggingface_llava), adapter=tmp_path / "adapter", target="lora")
    names = [key for key, value in model.named_parameters() if value.requires_grad]
    assert set(names) == set(wanted) and any("magnitude" in key for key in names)
    expected = torch.stack([torch.cat([row[key].flatten() for key in names]) for row in rows])
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "row": torch.arange(2)}
    torch.testing.assert_close(per_sample_gradients(model, batch), expected, atol=1e-6, rtol=1e-4)
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload(safe_merge=True)), before, atol=1e-5, rtol=1e-4)


OLD = {
    "transformers 4": lambda name: (
        name.replace("model.model.language_model.", "model.language_model.model.")
        .replace("model.model.vision_tower.", "model.vision_tower.vision_model.")
        .replace("model.model.multi_modal_projector.", "model.multi_modal_projector.")
    ),
    "a compiled model": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
}


@pytest.mark.parametrize("names", OLD)
@pytest.mark.parametrize("name", ["a projector trained whole", "LoRA on the vision tower"])
def test_names_of_another_version_give_the_same_model(
    name: str, names: str, huggingface_llava: Path, tmp_path: Path
) -> None:
    wanted = logits(trained(huggingface_llava, tmp_path / "adapter", CASES[name]))
    rewrite(tmp_path / "adapter", OLD[names])
    found = logits(loaded(huggingface_llava, tmp_path / "adapter"))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_scales_under_old_names_are_kept(huggingface_llava: Path, tmp_path: Path) -> None:
    """Weights and patterns are renamed together."""
    case = {
        "target_modules": TEXT,
        "rank_pattern": {"model.language_model.layers.0.self_attn.q_proj": 3},
        "alpha_pattern": {"model.language_model.layers.1.self_attn.v_proj": 40},
    }
    wanted = logits(trained(huggingface_llava, tmp_path / "adapter", case))
    rewrite(tmp_path / "adapter", OLD["transformers 4"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace("model.language_model.layers", "language_model.model.layers"))
    found = logits(loaded(huggingface_llava, tmp_path / "adapter"))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_a_scale_of_no_module_is_refused(huggingface_llava: Path, tmp_path: Path) -> None:
    trained(huggingface_llava, tmp_path / "adapter", CASES["single tokens"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": {"layers.7.q_proj": 3}}))
    with pytest.raises(ValueError, match=r"alpha_pattern names layers.7.q_proj, and the adapter has no such module"):
        loaded(huggingface_llava, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["an output layer trained whole", "LoRA on embedding and output"])
def test_an_enlarged_vocabulary_comes_with_the_adapter(name: str, huggingface_llava: Path, tmp_path: Path) -> None:
    wanted = logits(trained(huggingface_llava, tmp_path / "adapter", CASES[name], vocabulary=112))
    found = logits(loaded(huggingface_llava, tmp_path / "adapter"))
    assert found.shape[-1] == 112
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_a_whole_module_without_its_weights_is_refused(huggingface_llava: Path, tmp_path: Path) -> None:
    trained(huggingface_llava, tmp_path / "adapter", CASES["a projector trained whole"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "linear_2.bias" not in name}, file)
    with pytest.raises(ValueError, match=r"no tensor for 1 parameter of the adapter, such as .*linear_2.bias"):
        loaded(huggingface_llava, tmp_path / "adapter")
