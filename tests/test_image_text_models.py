"""Per-sample gradients of other image-text architectures, with images, against one backward pass per sample.

Rows with two images, none and one: three rows and three images, so that no shape tells whose an image is.
"""

import warnings
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
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from icons.batch import sample_losses
from icons.datamodules.chat.processor import join
from icons.gradients import per_sample_gradients
from icons.gradients.capture import SlowerPathWarning

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


def smol_vlm() -> nn.Module:
    config = SmolVLMConfig(
        text_config=LlamaConfig(**TEXT), vision_config=VISION | {"image_size": 16}, image_token_id=IMAGE, scale_factor=2
    )
    return SmolVLMForConditionalGeneration(config)


def llava(vision: Any = None) -> nn.Module:
    vision = vision or CLIPVisionConfig(**VISION, image_size=8)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE)
    )


def gemma_3() -> nn.Module:
    text = TEXT | {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 8}
    vision = VISION | {"image_size": 16}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=PER_IMAGE,
            image_token_index=IMAGE,
            boi_token_index=61,
            eoi_token_index=62,
        )
    )


def qwen_2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=TEXT | {"num_key_value_heads": 2, "rope_parameters": rope},
            vision_config=vision | {"spatial_merge_size": 2},
            image_token_id=IMAGE,
            vision_start_token_id=61,
            vision_end_token_id=62,
            video_token_id=60,
        )
    )


def pixels(*shape: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    """Three images of one shape: two are the first row's, one the last's."""
    return lambda row, generator: {"pixel_values": torch.randn((2, 0, 1)[row], *shape, generator=generator)}


def tiles(row: int, generator: torch.Generator) -> dict[str, Tensor]:
    """All images of a row in one entry, which is as long as the batch's longest."""
    return {"pixel_values": torch.randn(int(row != 1), (2, 0, 1)[row], 3, 16, 16, generator=generator)}


def patches(row: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Flat patches of images of one size, and their grids."""
    images = (2, 0, 1)[row]
    grid = torch.tensor([[1, 4, 4]]).expand(images, 3)
    return {
        "pixel_values": torch.randn(16 * images, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": grid,
    }


MODELS: dict[Callable[[], nn.Module], Callable[[int, torch.Generator], dict[str, Tensor]]] = {
    llava: pixels(3, 8, 8),
    vip_llava: pixels(3, 8, 8),
    intern_vl: pixels(3, 8, 8),
    aya_vision: pixels(3, 16, 16),
    pali_gemma: pixels(3, 8, 8),
    gemma_3: pixels(3, 16, 16),
    idefics_3: tiles,
    smol_vlm: tiles,
    qwen_2_vl: patches,
}


def samples_of(make: Callable[[], nn.Module]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for row, length in enumerate(LENGTHS):
        ids = torch.randint(3, 60, (1, length), generator=generator)
        for image in range((2, 0, 1)[row]):
            begin = 1 + image * (PER_IMAGE + 1)
            ids[:, begin : begin + PER_IMAGE] = IMAGE
        sample = {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100)}
        if make is pali_gemma:
            sample["labels"][:, :-2] = -100
            sample["token_type_ids"] = (sample["labels"] != -100).long()
        if make in (gemma_3, qwen_2_vl):
            sample["token_type_ids" if make is gemma_3 else "mm_token_type_ids"] = (ids == IMAGE).long()
        found.append(sample | MODELS[make](row, generator))
    return found


def batch_of(samples: list[dict[str, Tensor]]) -> dict[str, Any]:
    """As the datamodule collates them."""
    length = max(sample["labels"].shape[1] for sample in samples)
    batch: dict[str, Any] = {"row": torch.arange(len(samples)), "entries_per_row": {}}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if all(value.shape == sample["input_ids"].shape for value, sample in zip(values, samples, strict=True)):
            fill = -100 if name == "labels" else 0
            padded = [nn.functional.pad(value, (0, length - value.shape[1]), value=fill) for value in values]
            batch[name] = torch.cat(padded)
        else:
            batch["entries_per_row"][name] = torch.tensor([len(value) for value in values])
            batch[name] = join([value for value in values if len(value)] or values[:1])
            if not len(batch[name]):
                del batch[name]
    sizes = torch.tensor([sample["labels"].shape[1] for sample in samples])
    batch["attention_mask"] = (torch.arange(length) < sizes[:, None]).long()
    return batch


def with_lora(model: nn.Module, targets: str) -> nn.Module:
    found = get_peft_model(model, LoraConfig(r=3, target_modules=targets)).eval()
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return found


def one_by_one(model: nn.Module, samples: list[dict[str, Tensor]]) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = []
    for sample in samples:
        single = {name: value for name, value in sample.items() if name != "labels" and len(value)}
        logits = model(**single, attention_mask=torch.ones_like(sample["labels"]), use_cache=False).logits
        loss = sample_losses(logits, sample["labels"]).sum()
        reached = loss.requires_grad  # a tower's weights are not by a row without image
        alone = torch.autograd.grad(loss, parameters, allow_unused=True) if reached else [None] * len(parameters)
        zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, alone, strict=True)]
        rows.append(torch.cat([gradient.flatten() for gradient in zeros]))
    return torch.stack(rows)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_towers_and_text_equal_one_backward_pass_per_sample(make: Callable[[], nn.Module]) -> None:
    """Of rows together, in another order, and in smaller batches; none takes a backward pass of its own."""
    torch.manual_seed(0)
    model = with_lora(make(), r".*((q|v)_proj|qkv|fc1|mlp\.0|linear_1)")
    samples = samples_of(make)
    expected = one_by_one(model, samples)
    for order in ((0, 1, 2), (2, 0, 1), (0, 1), (1,), (2,)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", SlowerPathWarning)
            found = per_sample_gradients(model, batch_of([samples[row] for row in order]))
        error = (found - expected[list(order)]).norm(dim=1) / expected[list(order)].norm(dim=1)
        assert error.max() < 1e-5, order


@pytest.mark.parametrize("make", [smol_vlm, qwen_2_vl, llava], ids=lambda make: make.__name__)
def test_every_weight_of_tower_and_projector_equals_one_backward_pass_per_sample(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" not in name and "text_model" not in name and "lm_head" not in name)
    samples = samples_of(make)
    expected = one_by_one(model, samples)
    for order in ((0, 1, 2), (2, 0)):
        found = per_sample_gradients(model, batch_of([samples[row] for row in order]))
        true = expected[list(order)]
        assert ((found - true).norm(dim=1) <= 1e-5 * true.norm(dim=1)).all(), order


def test_pali_gemma_without_token_types_is_right_and_told_or_refused() -> None:
    """Without them nothing hides an answer's later tokens, padding among them."""
    torch.manual_seed(0)
    model = with_lora(pali_gemma(), r".*(q|v)_proj")
    samples = samples_of(pali_gemma)
    for sample in samples:
        del sample["token_type_ids"]
    expected = one_by_one(model, samples)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = per_sample_gradients(model, batch_of(samples))
        except ValueError as error:
            assert "in PeftModel a sample's loss depends on its padding" in str(error)
        else:
            assert any("depends on the very token that it is to predict" in str(each.message) for each in caught)
            assert ((found - expected).norm(dim=1) < 1e-5 * expected.norm(dim=1)).all()


def test_rows_with_images_that_see_one_another_are_refused() -> None:
    """The same number of images beside each other, so that padding and the last token show nothing."""
    torch.manual_seed(0)
    model = with_lora(llava(), r".*(q|v)_proj")
    tower: Any = model.base_model.model.model.vision_tower  # type: ignore[union-attr]
    tower.register_forward_pre_hook(lambda _tower, args: (args[0] - args[0].mean(0), *args[1:]))
    with pytest.raises(ValueError, match="a sample's loss depends on its padding or the samples beside it"):
        per_sample_gradients(model, batch_of(samples_of(llava)[::2]))
