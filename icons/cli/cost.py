"""What a model costs: the bytes and the operations of a run, estimated from counts alone."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "8bit": 1.0, "4bit": 0.5}
A100_FLOPS = 312e12  # bfloat16, dense: NVIDIA's data sheet
# Share of a matrix product's speed that a run reaches. LLaVA's README gives 20 hours for 13B on LLaVA-665K, 8 A100s;
# at about 900 tokens a row and 6 operations per parameter and token that is 0.26 of 312 TFLOP/s.
EFFICIENCY = 0.25
TOWER_NAMES = ("vision_tower", "vision_model")


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that memory and time follow from."""

    language: int
    """Parameters of everything but the vision tower and the adapter."""
    tower: int
    """Parameters of the vision tower."""
    trainable: int
    """Parameters that are trained or differentiated."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    image_tokens: int
    """Features of an image in the language model; 0 for a text model."""

    @classmethod
    def of(cls, model: nn.Module, image_tokens: int) -> "ModelSize":
        """Counts a model, which may be on the meta device."""
        named = dict(model.named_parameters())
        trainable = sum(parameter.numel() for parameter in named.values() if parameter.requires_grad)
        tower = sum(value.numel() for name, value in named.items() if any(part in name for part in TOWER_NAMES))
        adapter = sum(value.numel() for name, value in named.items() if "lora_" in name)
        text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
        return cls(
            language=sum(value.numel() for value in named.values()) - tower - adapter,
            tower=tower,
            trainable=trainable,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            heads=text.num_attention_heads,
            vocabulary=text.vocab_size,
            image_tokens=image_tokens,
        )


@dataclass(frozen=True)
class Workload:
    """How the rows are run through the model, on each rank."""

    lengths: Sequence[int]
    """Tokens of a sample of the rows, images expanded."""
    batch_size: int
    max_tokens: int | None = None
    dtype: str = "bfloat16"
    quantize: str | None = None
    attention: str = "sdpa"
    gradient_checkpointing: bool = False

    @property
    def mean_length(self) -> float:
        return sum(self.lengths) / max(1, len(self.lengths))

    @property
    def batch_tokens(self) -> int:
        """Tokens of the largest batch, padding included."""
        most = self.batch_size * max(self.lengths, default=0)
        return min(most, self.max_tokens) if self.max_tokens else most


def weights(model: ModelSize, load: Workload) -> dict[str, int]:
    """Bytes of the weights: embeddings, output layer and tower are never quantised; the adapter is float32."""
    dense = min(model.language, 2 * model.vocabulary * model.hidden)
    inner = (model.language - dense) * BYTES[load.quantize or load.dtype]
    return {"weights": int(inner + (dense + model.tower) * BYTES[load.dtype] + 4 * model.trainable)}


def activations(model: ModelSize, load: Workload) -> dict[str, int]:
    """Bytes that the backward pass needs, for the largest batch.

    Per token and layer 6 hidden vectors (inputs of q and of the MLP, q, k, v, attention) and 4 intermediate ones (gate,
    its activation, up, their product) in the model's dtype, and 2 hidden vectors in float32 (norms): what a Llama with
    LoRA on every linear layer keeps, measured. With eager attention also its weights; under gradient checkpointing one
    hidden vector per layer and one layer in full. Logits and their gradients twice in the model's dtype and, where a
    token is supervised (taken as half), in float32.
    """
    tokens, width = load.batch_tokens, BYTES[load.dtype]
    layer = tokens * (width * (6 * model.hidden + 4 * model.intermediate) + 8 * model.hidden)
    if load.attention == "eager":
        layer += tokens * max(load.lengths, default=0) * model.heads * (width + 4)
    kept = model.layers * tokens * model.hidden * width + layer if load.gradient_checkpointing else model.layers * layer
    return {"activations": int(kept), "logits": int(tokens * model.vocabulary * (2 * width + 4))}


def supervised_logits(model: ModelSize, load: Workload) -> dict[str, int]:
    """Bytes of logits and their gradient in `icons gradients`: of supervised tokens alone (taken as half), in the
    model's dtype; float32 ones exist in chunks of 4 M, three of them (`icons.gradients.output_layer`)."""
    tokens = load.batch_tokens / 2
    return {
        "logits": int(
            tokens * model.vocabulary * 2 * BYTES[load.dtype] + 3 * 4 * min(1 << 22, tokens * model.vocabulary)
        )
    }


def row_operations(model: ModelSize, load: Workload) -> float:
    """Floating-point operations for a row of mean length: forward, backward towards the adapter, tower forward."""
    per_parameter = 6 if load.gradient_checkpointing else 4
    inner = model.language - model.vocabulary * model.hidden  # looking up an embedding costs nothing
    image = 2 * model.tower * model.image_tokens
    return per_parameter * inner * load.mean_length + image


def device_speed(dtype: str) -> tuple[float, str]:
    """Operations per second to reckon with, and what that is based on: this machine's device, timed for a moment.

    On a machine without a GPU a bfloat16 or float16 run is reckoned for an A100, since it will not happen here.
    """
    if not torch.cuda.is_available() and dtype != "float32":
        return EFFICIENCY * A100_FLOPS, "for A100 GPUs, none being here"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width = 4096 if device.type == "cuda" else 512
    factor = torch.ones(width, width, dtype=getattr(torch, dtype), device=device)
    rounds, spent = 0, 0.0
    start = time.perf_counter()
    while spent < 0.1:
        (factor @ factor)[0, 0].item()  # waits for the device
        rounds, spent = rounds + 1, time.perf_counter() - start
    return EFFICIENCY * rounds * 2 * width**3 / spent, f"from a matrix product timed on this {device.type}"
