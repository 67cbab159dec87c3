"""RunEstimate: what a run would do, worked out without loading a weight or writing a byte (`--dry-run`)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from icons.cli.cost import (
    BYTES,
    ModelSize,
    Workload,
    activations,
    device_speed,
    row_operations,
    supervised_logits,
    weights,
)
from icons.models.folder import ModelFolder
from icons.models.loading import empty_model
from icons.models.lora import LoraSettings
from icons.modules.collector import DIFFERENTIATED
from icons.modules.fit import ranks_of
from icons.partition import parse_shard
from icons.store import fitting_chunk_rows

ROW_BYTES = 4 + 4 + 4 + 1  # norm, loss, tokens, status


@dataclass(frozen=True)
class RunEstimate:
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


def estimate_warmup(
    model: ModelSize,
    load: Workload,
    *,
    num_rows: int,
    ranks: int,
    accumulate: int,
    epochs: int,
    settings: dict[str, Any],
) -> RunEstimate:
    """The plan of `icons warmup` over `num_rows` rows.

    Frozen weights take part in the forward pass and in the backward pass towards the adapter, not in one towards
    themselves: 4 operations per parameter and token, 6 with gradient checkpointing. Trained parameters are float32
    with a gradient and two moments.
    """
    per_rank = split(num_rows, ranks)
    batches = math.ceil(max(per_rank) / load.batch_size)
    memory = weights(model, load) | {"gradients and moments": 12 * model.trainable} | activations(model, load)
    speed, said = device_speed(load.dtype)
    return RunEstimate(
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


def estimate_gradients(
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
    signs: int = 0,
    differentiates: bool = True,
    settings: dict[str, Any],
) -> RunEstimate:
    """The plan of `icons gradients` over a file of `num_rows` rows.

    Ranks own whole units of `chunk_rows` rows. Work as in training; in place of the optimizer there are Adam's moments
    (`moments`), the signs of `signs` count sketches, and one layer's gradient per sample at a time. What is not
    differentiated (representations, losses) takes a forward pass alone.
    """
    units = math.ceil(num_rows / chunk_rows)
    per_rank = [min(chunk_rows * count, num_rows) for count in split(math.ceil(units / shards), ranks)]
    memory = weights(model, load)
    memory |= {"moments": 8 * model.trainable} if moments else {}
    memory |= {"signs of the projection": 4 * signs * model.trainable} if signs else {}
    memory |= activations(model, load if differentiates else replace(load, gradient_checkpointing=True))
    memory |= supervised_logits(model, load)
    if differentiates:
        memory["gradients of a layer"] = 4 * load.batch_size * model.trainable // model.layers
    operations = row_operations(model, load) / (1 if differentiates else 2)
    speed, said = device_speed(load.dtype)
    scale = 0 if store_dtype == "float32" else 4
    return RunEstimate(
        settings=settings,
        rows_per_rank=per_rank,
        steps=math.ceil(max(per_rank) / load.batch_size),
        files={"gradients": int(num_rows * dim * BYTES[store_dtype]), "scalars": num_rows * (ROW_BYTES + scale)},
        memory=memory,
        seconds=max(per_rank) * operations / speed,
        speed=said,
    )


def estimate_gradients_run(
    folder: ModelFolder,
    adapter: Path | None,
    dataset: Any,
    *,
    target: Literal["lora", "trainable"],
    collect: str = "gradients",
    projector: str = "count_sketch",
    dim: int | Sequence[int],
    store_dtype: Literal["float16", "float32", "int8"],
    preconditioner: str,
    batch_size: int,
    max_tokens: int | None,
    model_dtype: str,
    attention: str,
    quantize: str | None,
    gradient_checkpointing: bool,
    trust_remote_code: bool,
    chunk_rows: int | None,
    shard: str | None,
    trainer: Mapping[str, Any] | None,
    settings: dict[str, Any],
) -> RunEstimate:
    """The plan of one `icons gradients`, from its options: counts the model from its configuration alone.

    Args:
        folder: the base model.
        adapter: folder of the LoRA adapter; its rank and targets are read, not its weights.
        dataset: a ConversationDataset: its number of rows, and the lengths of 256 of them.
        settings: what to show as resolved settings.
    """
    lora = None if adapter is None else lora_settings(adapter)
    empty = empty_model(folder, lora=lora, target=target, trust_remote_code=trust_remote_code)
    size_of_model = ModelSize.of(empty, folder.image_tokens)
    num_rows = len(dataset)
    dtype = (
        ("bfloat16" if torch.cuda.is_available() else "float32") if model_dtype in ("auto", "stored") else model_dtype
    )
    lengths = dataset.lengths(evenly(range(num_rows)))
    differentiates = collect in DIFFERENTIATED
    whole = [size_of_model.hidden if collect == "representations" else 1]
    dims = whole if not differentiates else [dim] if isinstance(dim, int) else list(dim)
    return estimate_gradients(
        size_of_model,
        Workload(lengths, batch_size, max_tokens, dtype, quantize, attention, gradient_checkpointing),
        num_rows=num_rows,
        ranks=ranks_of(trainer),
        shards=1 if shard is None else parse_shard(shard)[1],
        chunk_rows=chunk_rows or min(fitting_chunk_rows(num_rows, max(dims), store_dtype), num_rows),
        dim=sum(dims),
        store_dtype=store_dtype,
        moments=differentiates and preconditioner in ("adam", "diagonal"),
        signs=len(dims) if differentiates and projector == "count_sketch" else 0,
        differentiates=differentiates,
        settings=settings,
    )


def lora_settings(adapter: Path) -> LoraSettings:
    """Rank and targets of a saved adapter; a list of layer names (LLaVA's) means the language model's linear layers."""
    saved = json.loads((adapter / "adapter_config.json").read_text())
    targets = saved.get("target_modules")
    return LoraSettings(rank=saved["r"], targets=targets if isinstance(targets, str) else None)


def evenly(rows: Sequence[int], most: int = 256) -> list[int]:
    """Evenly spaced rows, whose lengths stand for all.

    >>> evenly(range(10), 4)
    [0, 3, 6, 9]
    """
    return list(rows[:: -(-len(rows) // most)]) if rows else []


def split(count: int, parts: int) -> list[int]:
    """`count` things in `parts` nearly equal shares, the larger ones first.

    >>> split(10, 4)
    [3, 3, 2, 2]
    """
    return [count // parts + (part < count % parts) for part in range(parts)]


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
