"""Tiny models and batches, and the oracle: one backward pass per sample, alone and unpadded."""

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from icons.batch import model_inputs, sample_losses
from icons.models.llava import Llava

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE = -200


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | changes))


def llava() -> nn.Module:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(text_config=LlamaConfig(**SMALL), vision_config=vision, image_token_index=63)
    return Llava.of(LlavaForConditionalGeneration(config), IMAGE)


def with_lora(model: nn.Module, targets: Any = "all-linear", **changes: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_peft_model(model, LoraConfig(r=3, lora_dropout=0.1, target_modules=targets, **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return found


def text_batch(lengths: tuple[int, ...] = (12, 5, 9), padded: int = 14) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (len(lengths), padded), generator=generator)
    mask = torch.arange(padded) < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask, -100)
    labels[:, :3] = -100
    return {
        "input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels,
        "row": torch.arange(len(lengths)),
    }  # fmt: skip


def image_batch() -> dict[str, Tensor]:
    """Rows with two images, none, and one that is cut; four features an image."""
    batch = text_batch((12, 9, 7), 13)
    batch["input_ids"][0, 1:5] = batch["input_ids"][0, 6:10] = IMAGE
    batch["input_ids"][2, 5:7] = IMAGE
    batch["labels"][batch["input_ids"] == IMAGE] = -100
    batch["labels"][2, 3:5] = torch.tensor([5, 6])
    batch["pixel_values"] = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return batch


def alone(batch: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """One sample of a batch, unpadded, with its own images."""
    length = int(batch["attention_mask"][sample].sum())
    found = {name: batch[name][sample : sample + 1, :length] for name in ("input_ids", "attention_mask", "labels")}
    if "pixel_values" in batch:
        images = -(-(batch["input_ids"] == IMAGE).sum(dim=1) // 4)
        begin = int(images[:sample].sum())
        pixels = batch["pixel_values"][begin : begin + int(images[sample])]
        found |= {"pixel_values": pixels} if len(pixels) else {}
    return found


def one_by_one(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The slow oracle: `torch.autograd.grad` of each sample's loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = []
    for sample in range(len(batch["labels"])):
        single = alone(batch, sample)
        loss = sample_losses(model(**model_inputs(single), use_cache=False).logits, single["labels"]).sum()
        found = (
            torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else [None] * len(parameters)
        )
        zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        rows.append(torch.cat([gradient.flatten().float() for gradient in zeros]))
    return torch.stack(rows)


def assert_rows_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-7)
    assert error.max() < tolerance, error


def trainable(model: nn.Module, names: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in names.split()))
    return model.eval()
