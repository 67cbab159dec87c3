"""Plan: what a run would do, worked out without loading a weight or writing a byte (`--dry-run`)."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "8bit": 1.0, "4bit": 0.5}
A100_FLOPS = 312e12  # bfloat16, dense: NVIDIA's data sheet
# Share of a matrix product's speed that a run reaches. LLaVA's README gives 20 hours for 13B on LLaVA-665K, 8 A100s;
# at about 900 tokens a row and 6 operations per parameter and token that is 0.26 of 312 TFLOP/s.
EFFICIENCY = 0.25
ROW_BYTES = 4 + 4 + 4 + 1  # norm, loss, tokens, status
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


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    settings: dict[str, Any]
    rows_per_rank: list[int]
    steps: int
    """Optimizer steps (warm-up) or batches of the busiest rank (gradients)."""
    files: dict[str, int]
    """Bytes that will be written, by name."""
    memory: dict[str, int]
    """Bytes of memory per device, by what they are for."""
    seconds: float
    speed: str
    """What the predicted time is based on."""

    def show(self, console: Console) -> None:
        """Prints the plan; the numbers that are estimates are called so."""
        console.print(table("resolved settings", {name: shown(value) for name, value in self.settings.items()}))
        ranks = len(self.rows_per_rank)
        least, most = min(self.rows_per_rank), max(self.rows_per_rank)
        per_rank = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        work = {"ranks": str(ranks), "rows per rank": per_rank, "steps": f"{self.steps:,}"}
        work |= {f"writes {name}": size(count) for name, count in self.files.items()}
        work["writes in all"] = size(sum(self.files.values()))
        work |= {f"memory, {name}": size(count) for name, count in self.memory.items()}
        work["memory per GPU, about"] = size(sum(self.memory.values()))
        work["time, about"] = f"{duration(self.seconds)} ({self.speed})"
        console.print(table("work", work))
        console.print("dry run: nothing was written")


def plan_warmup(
    model: ModelSize,
    load: Workload,
    *,
    num_rows: int,
    ranks: int,
    accumulate: int,
    epochs: int,
    settings: dict[str, Any],
) -> Plan:
    """The plan of `icons warmup` over `num_rows` rows.

    Frozen weights take part in the forward pass and in the backward pass towards the adapter, not in one towards
    themselves: 4 operations per parameter and token, 6 with gradient checkpointing. Trained parameters are float32
    with a gradient and two moments.
    """
    per_rank = split(num_rows, ranks)
    batches = math.ceil(max(per_rank) / load.batch_size)
    memory = weights(model, load) | {"gradients and moments": 12 * model.trainable} | activations(model, load)
    speed, said = device_speed(load.dtype)
    return Plan(
        settings=settings,
        rows_per_rank=per_rank,
        steps=epochs * math.ceil(batches / accumulate),
        files={
            "adapter": 4 * model.trainable,
            "Adam's moments": 8 * model.trainable,
            "last.ckpt": 12 * model.trainable,
        },
        memory=memory,
        seconds=epochs * max(per_rank) * row_operations(model, load) / speed,
        speed=said,
    )


def plan_gradients(
    model: ModelSize,
    load: Workload,
    *,
    num_rows: int,
    ranks: int,
    shards: int,
    chunk_rows: int,
    dim: int,
    store_dtype: str,
    moments: bool,
    settings: dict[str, Any],
) -> Plan:
    """The plan of `icons gradients` over a file of `num_rows` rows.

    Ranks own whole units of `chunk_rows` rows. Work as in training; in place of the optimizer there are Adam's moments
    (`moments`) and one layer's gradient per sample at a time.
    """
    units = math.ceil(num_rows / chunk_rows)
    per_rank = [min(chunk_rows * count, num_rows) for count in split(math.ceil(units / shards), ranks)]
    memory = weights(model, load)
    memory |= {"moments": 8 * model.trainable} if moments else {}
    memory |= activations(model, load) | {"gradients of a layer": 4 * load.batch_size * model.trainable // model.layers}
    speed, said = device_speed(load.dtype)
    scale = 4 if store_dtype == "int8" else 0
    return Plan(
        settings=settings,
        rows_per_rank=per_rank,
        steps=math.ceil(max(per_rank) / load.batch_size),
        files={"gradients": int(num_rows * dim * BYTES[store_dtype]), "scalars": num_rows * (ROW_BYTES + scale)},
        memory=memory,
        seconds=max(per_rank) * row_operations(model, load) / speed,
        speed=said,
    )


def split(count: int, parts: int) -> list[int]:
    """`count` things in `parts` nearly equal shares, the larger ones first.

    >>> split(10, 4)
    [3, 3, 2, 2]
    """
    return [count // parts + (part < count % parts) for part in range(parts)]


def weights(model: ModelSize, load: Workload) -> dict[str, int]:
    """Bytes of the weights: embeddings, output layer and tower are never quantised; the adapter is float32."""
    dense = min(model.language, 2 * model.vocabulary * model.hidden)
    inner = (model.language - dense) * BYTES[load.quantize or load.dtype]
    return {"weights": int(inner + (dense + model.tower) * BYTES[load.dtype] + 4 * model.trainable)}


def activations(model: ModelSize, load: Workload) -> dict[str, int]:
    """Bytes that the backward pass needs, for the largest batch.

    Per token and layer 8 hidden and 3 intermediate vectors (norms, q, k, v, attention, MLP), with eager attention also
    its weights; under gradient checkpointing one hidden vector per layer and one layer in full. Logits and their
    gradients twice in the model's dtype and, where a token is supervised (taken as half), in float32.
    """
    tokens, width = load.batch_tokens, BYTES[load.dtype]
    layer = tokens * width * (8 * model.hidden + 3 * model.intermediate)
    if load.attention == "eager":
        layer += tokens * max(load.lengths, default=0) * model.heads * (width + 4)
    kept = model.layers * tokens * model.hidden * width + layer if load.gradient_checkpointing else model.layers * layer
    return {"activations": int(kept), "logits": int(tokens * model.vocabulary * (2 * width + 4))}


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


def ranks_of(trainer: Mapping[str, Any] | None) -> int:
    """Processes that Trainer flags ask for: devices x nodes, `auto` and -1 counted on this machine."""
    flags = trainer or {}
    devices = flags.get("devices", "auto")
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        count = torch.cuda.device_count() if flags.get("accelerator", "auto") in ("auto", "gpu", "cuda") else 1
    else:
        count = len(str(devices).split(",")) if "," in str(devices) else int(devices)
    return max(1, count) * int(flags.get("num_nodes", 1))


def table(title: str, lines: Mapping[str, str]) -> Table:
    shown_table = Table(title=title, show_header=False, title_justify="left")
    for name, value in lines.items():
        shown_table.add_row(name, value)
    return shown_table


def shown(value: Any) -> str:
    return ", ".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)


def size(count: float | int) -> str:
    """Bytes as people read them.

    >>> size(319_815_680 * 4), size(12)
    ('1.28 GB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float | int) -> str:
    """
    >>> duration(45), duration(600), duration(20_000)
    ('45 s', '10 min', '5.6 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
