"""A tiny LLaVA, LLaVA-1.5-7B with random weights, their batches, and plain passes over them."""

from typing import Any

import torch
from bench_gradients import IMAGE
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from icons.batch import model_inputs, sample_losses
from icons.gradients.capture import trainable_parameters
from icons.gradients.output_layer import SupervisedPositions
from icons.models.llava import Llava
from icons.models.loading import choose_trainable
from icons.models.lora import LoraSettings, add_lora


def make_batch(model: Any, rows: int, length: int, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Rows of one image and text, right-padded by up to a quarter of the text; its last half is supervised."""
    generator = torch.Generator().manual_seed(seed)
    vision = model.config.vision_config
    image = (vision.image_size // vision.patch_size) ** 2
    ids = torch.randint(3, 400, (rows, length), generator=generator)
    ids[:, 4 : 4 + image] = IMAGE
    lengths = torch.randint(length - (length - image) // 4, length + 1, (rows, 1), generator=generator)
    mask = torch.arange(length) < lengths
    labels = ids.masked_fill(~mask, -100)
    labels[:, : (length + image + 4) // 2] = -100
    pixels = torch.randn(rows, 3, vision.image_size, vision.image_size, generator=generator)
    batch = {
        "input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels,
        "row": torch.arange(rows) + rows * seed, "pixel_values": pixels,
    }  # fmt: skip
    return {name: value.to(device) for name, value in batch.items()}


def tiny(device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The same tiny LLaVA each time: frozen weights of this dtype, adapter float32."""
    model = add_lora(Llava.of(tiny_base(), IMAGE), LoraSettings(rank=4, alpha=8.0))
    fill_adapter(model)
    for parameter in model.parameters():  # buffers stay: rotary frequencies are float32 in half models too
        parameter.data = parameter.data.to(dtype)
    choose_trainable(model, "lora")
    return model.to(device).eval()


def tiny_base() -> LlavaForConditionalGeneration:
    """Every width is one that half-precision and 4-bit kernels take."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8
    )
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=511))


def large(device: torch.device) -> Any:
    """LLaVA-1.5-7B with random weights and LoRA r = 128."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=32000)
    with torch.device(device):
        base = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
        model = add_lora(Llava.of(base, IMAGE), LoraSettings())
    choose_trainable(model, "lora")
    fill_adapter(model)
    return model.to(device).eval()


def fill_adapter(model: nn.Module) -> None:
    """A fresh adapter's B is zero, and with it the gradient of A."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


def alone(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """`[B, P]`: one plain backward pass per sample, which owes nothing to the library."""
    parameters, rows = list(trainable_parameters(model).values()), []
    for sample in range(len(batch["labels"])):
        single = {name: value[sample : sample + 1] for name, value in batch.items()}
        loss = sample_losses(model(**model_inputs(single), use_cache=False).logits, single["labels"]).sum()
        rows.append(torch.cat([part.float().flatten() for part in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def plain(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """What one training step costs, without its optimizer."""
    model.zero_grad()
    SupervisedPositions(model, batch["labels"]).run(model, batch).mean().backward()
