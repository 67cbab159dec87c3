"""Per-sample gradients of other image-text architectures, with images, against one backward pass per sample."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Config,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from icons.batch import sample_losses
from icons.gradients import per_sample_gradients

pytestmark = pytest.mark.filterwarnings("ignore")
IMAGE, PER_IMAGE, LENGTHS = 63, 4, (14, 9, 11)
TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
}  # fmt: skip


def vip_llava() -> nn.Module:
    vision = CLIPVisionConfig(**VISION | {"num_hidden_layers": 4}, image_size=8)
    text = LlamaConfig(**TEXT)
    config = VipLlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, vision_feature_layers=[-2, -1]
    )
    return VipLlavaForConditionalGeneration(config)


def intern_vl() -> nn.Module:
    vision = VISION | {"image_size": [8, 8], "patch_size": [2, 2]}
    text = Qwen2Config(**TEXT, num_key_value_heads=2).to_dict()
    config = InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=PER_IMAGE, downsample_ratio=0.5
    )
    return InternVLForConditionalGeneration(config)


def aya_vision() -> nn.Module:
    text = {"model_type": "llama", **TEXT}
    vision = {"model_type": "siglip_vision_model", "image_size": 16, **VISION}
    config = AyaVisionConfig(
        text_config=text,
        vision_config=vision,
        downsample_factor=2,
        image_token_index=IMAGE,
        adapter_layer_norm_eps=1e-6,
    )
    return AyaVisionForConditionalGeneration(config)


def pali_gemma() -> nn.Module:
    text = {"model_type": "gemma", "head_dim": 8, "num_key_value_heads": 2, **TEXT}
    vision = {"model_type": "siglip_vision_model", "image_size": 8, "vision_use_head": False, **VISION}
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32)
    return PaliGemmaForConditionalGeneration(config)


def idefics_3() -> nn.Module:
    config = Idefics3Config(
        text_config=LlamaConfig(**TEXT), vision_config=VISION | {"image_size": 16}, image_token_id=IMAGE, scale_factor=2
    )
    return Idefics3ForConditionalGeneration(config)


MODELS: dict[Callable[[], nn.Module], tuple[int, ...]] = {
    vip_llava: (3, 8, 8),
    intern_vl: (3, 8, 8),
    aya_vision: (3, 16, 16),
    pali_gemma: (3, 8, 8),
    idefics_3: (1, 3, 16, 16),
}


def batch_of(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (3, 14), generator=generator)
    ids[:, 1 : 1 + PER_IMAGE] = IMAGE
    mask = torch.arange(14) < torch.tensor(LENGTHS)[:, None]
    ids = ids.masked_fill(~mask, 0)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "row": torch.arange(3)}
    batch["labels"] = ids.masked_fill(~mask | (ids == IMAGE), -100)
    batch["pixel_values"] = torch.randn(3, *MODELS[make], generator=generator)
    return batch | ({"token_type_ids": torch.zeros_like(ids)} if make is pali_gemma else {})


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_equals_one_backward_pass_per_sample(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    targets = r".*(language_model|text_model).*(q|v)_proj"
    model = get_peft_model(make(), LoraConfig(r=3, target_modules=targets)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    batch = batch_of(make)
    found = per_sample_gradients(model, batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for sample, length in enumerate(LENGTHS):
        single = {name: batch[name][sample : sample + 1, :length] for name in batch if batch[name].shape == (3, 14)}
        labels = single.pop("labels")
        logits = model(**single, pixel_values=batch["pixel_values"][sample : sample + 1], use_cache=False).logits
        alone = torch.autograd.grad(sample_losses(logits, labels).sum(), parameters)
        expected = torch.cat([gradient.flatten() for gradient in alone])
        assert (found[sample] - expected).norm() < 1e-5 * expected.norm()
