"""The estimates of `icons warmup`, `icons gradients` and `icons factors`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from icons.cli.estimate.probe import Kind, image_operations, operations, peak_memory
from icons.cli.estimate.run_estimate import RunEstimate
from icons.cli.estimate.speed import device_speed
from icons.cli.estimate.workload import BYTES, ModelSize, Workload, weights
from icons.cli.options.factors import FactorsOptions
from icons.cli.options.gradients import GradientsOptions
from icons.kronecker import KroneckerFactors
from icons.models.folder import ModelFolder
from icons.models.loading import empty_model
from icons.models.lora import LoraSettings
from icons.modules.collector import DIFFERENTIATED
from icons.modules.factor_pass import FactorSettings
from icons.modules.fit import ranks_of, resolved_dtype
from icons.modules.named_strategy import sharing_ranks
from icons.partition import Partition, parse_shard
from icons.store import fitting_chunk_rows

_ROW_BYTES = 4 + 4 + 4 + 1  # norm, loss, tokens, status
_LOOKED_AT = 8
"""Rows whose images are opened, for the work of the vision tower."""


@dataclass(frozen=True)
class Plan:
    """A model on the meta device, and what is to be run through it.

    Attributes:
        model: with its adapter.
        load: how.
        images: of some rows: `pixel_values` and what belongs to them; empty for text.
        image_rows: how many rows these are.
    """

    model: nn.Module
    load: Workload
    images: Mapping[str, Any]
    image_rows: int

    @classmethod
    def of(cls, model: nn.Module, dataset: Any, rows: Sequence[int], **load: Any) -> "Plan":
        """Takes the lengths of 256 of a ConversationDataset's rows, and the images of 8."""
        some = evenly(rows, _LOOKED_AT)
        batch = dataset.collate([dataset[row] for row in some])
        images = batch if "pixel_values" in batch else {}
        return cls(model, Workload(dataset.lengths(evenly(rows)), **load), images, max(1, len(batch["input_ids"])))

    def row_operations(self, kind: Kind) -> float:
        """Operations of a row of mean length, with its share of the images."""
        images = image_operations(self.model, self.images) / self.image_rows if self.images else 0
        return operations(self.model, kind, max(2, self.load.mean_length), self.load) + images

    def batch_memory(self, kind: Kind) -> int:
        """Bytes that the largest batch takes beside weights, moments and summed gradients."""
        rows, length = self.load.largest_batch
        return int(peak_memory(self.model, kind, rows, max(2, length), self.load))


def estimate_warmup(
    plan: Plan, *, num_rows: int, ranks: int, accumulate: int, epochs: int, settings: dict[str, Any]
) -> RunEstimate:
    """What `icons warmup` would do with `num_rows` rows; what is trained is float32 with a gradient and two moments."""
    per_rank, size = split(num_rows, ranks), ModelSize.of(plan.model)
    batches = math.ceil(max(per_rank) / plan.load.batch_size)
    memory = weights(size, plan.load) | {"gradients and moments": 12 * size.trainable}
    speed, said = device_speed(plan.load.dtype)
    return RunEstimate(
        settings=settings,
        rows_per_rank=per_rank,
        steps=epochs * math.ceil(batches / accumulate),
        files={
            "adapter": 4 * size.trainable,
            "Adam's moments": 8 * size.trainable,
            "last.ckpt": 12 * size.trainable,
        },
        memory=memory | {"a batch": plan.batch_memory("training")},
        seconds=epochs * max(per_rank) * plan.row_operations("training") / speed,
        speed=said,
    )


def estimate_gradients(
    plan: Plan,
    *,
    num_rows: int,
    ranks: int,
    shards: int,
    chunk_rows: int,
    dim: int,
    store_dtype: str,
    moments: bool,
    signs: int = 0,
    factors: int = 0,
    differentiates: bool = True,
    settings: dict[str, Any],
) -> RunEstimate:
    """What `icons gradients` would do with a file of `num_rows` rows.

    Ranks own whole units of `chunk_rows` rows. In place of an optimizer there are Adam's moments (`moments`), the signs
    of `signs` count sketches, and `factors` bytes of Kronecker factors. What is not differentiated (representations,
    losses) takes a forward pass alone.
    """
    units, size = math.ceil(num_rows / chunk_rows), ModelSize.of(plan.model)
    per_rank = [min(chunk_rows * count, num_rows) for count in split(math.ceil(units / shards), ranks)]
    kind: Kind = "per-sample" if differentiates else "forward"
    memory = weights(size, plan.load)
    memory |= {"moments": 8 * size.trainable} if moments else {}
    memory |= {"Kronecker factors": factors} if factors else {}
    memory |= {"signs of the projection": 4 * signs * size.trainable} if signs else {}
    speed, said = device_speed(plan.load.dtype)
    scale = 0 if store_dtype == "float32" else 4
    return RunEstimate(
        settings=settings,
        rows_per_rank=per_rank,
        steps=math.ceil(max(per_rank) / plan.load.batch_size),
        files={"gradients": int(num_rows * dim * BYTES[store_dtype]), "scalars": num_rows * (_ROW_BYTES + scale)},
        memory=memory | {"a batch": plan.batch_memory(kind)},
        seconds=max(per_rank) * plan.row_operations(kind) / speed,
        speed=said,
    )


def estimate_gradients_run(
    options: GradientsOptions,
    folder: ModelFolder,
    adapter: Path | None,
    dataset: Any,
    dims: Sequence[int],
    *,
    preconditioner: str,
    settings: dict[str, Any],
) -> RunEstimate:
    """What one `icons gradients` would do: the model is made from its configuration alone.

    Args:
        options: of the command.
        folder: the base model.
        adapter: folder of the LoRA adapter; its rank and targets are read, not its weights.
        dataset: a ConversationDataset.
        dims: numbers per row of each store.
        preconditioner: which.
        settings: what to show as resolved settings.
    """
    num_rows, differentiates = len(dataset), options.collect in DIFFERENTIATED
    plan = _plan(options, folder, adapter, dataset, range(num_rows))
    if not differentiates:
        dims = [plan.model.config.get_text_config().hidden_size if options.collect == "representations" else 1]  # type: ignore[union-attr,operator]
    fitting = fitting_chunk_rows(num_rows, max(dims), options.dtype)
    return estimate_gradients(
        plan,
        num_rows=num_rows,
        ranks=ranks_of(options.trainer),
        shards=1 if options.shard is None else parse_shard(options.shard)[1],
        chunk_rows=options.chunk_rows or min(fitting, num_rows),
        dim=sum(dims),
        store_dtype=options.dtype,
        moments=differentiates and preconditioner in ("adam", "diagonal"),
        factors=KroneckerFactors.load(options.factors).num_bytes if options.factors and differentiates else 0,
        signs=len(dims) if differentiates and options.projector == "count_sketch" else 0,
        differentiates=differentiates,
        settings=settings,
    )


def estimate_factors(
    plan: Plan, chosen: Partition, *, ranks: int, shards: int, width: int, drawn: bool, settings: dict[str, Any]
) -> RunEstimate:
    """What `icons factors` would do with the chosen rows, which ranks and shards compute in whole parts.

    A pass as for gradients, for drawn labels a forward pass more. Each rank sums covariances in float64 on the host; a
    device holds those of a batch, and the file all of them, in float32.
    """
    entries, size = _covariance_entries(plan.model, width), ModelSize.of(plan.model)
    parts = split(math.ceil(chosen.num_units / shards), ranks)
    per_rank = [min(chosen.chunk_rows * count, chosen.num_rows) for count in parts]
    kinds: list[Kind] = ["per-sample", "forward"] if drawn else ["per-sample"]
    speed, said = device_speed(plan.load.dtype)
    return RunEstimate(
        settings=settings,
        rows_per_rank=per_rank,
        steps=math.ceil(max(per_rank) / plan.load.batch_size),
        files={"factors": 4 * entries, "parts, until all are there": 8 * entries * chosen.num_units},
        memory=weights(size, plan.load) | {"covariances": 4 * entries, "a batch": plan.batch_memory("per-sample")},
        seconds=max(per_rank) * sum(map(plan.row_operations, kinds)) / speed,
        speed=said,
    )


def _covariance_entries(model: nn.Module, width: int) -> int:
    """Numbers in the covariances of the trainable linear layers: whole for sides up to `width`, else their diagonals.

    >>> _covariance_entries(nn.Linear(4, 6), 4)
    22
    """
    sides = [
        side for module in model.modules() if isinstance(module, nn.Linear) and module.weight.requires_grad
        for side in module.weight.shape
    ]  # fmt: skip
    return sum(side**2 if side <= width else side for side in sides)


def estimate_factors_run(
    options: FactorsOptions, chosen: FactorSettings, folder: ModelFolder, adapter: Path | None, dataset: Any
) -> RunEstimate:
    """What one `icons factors` would do: the model is made from its configuration alone."""
    rows = chosen.chosen(len(dataset))
    return estimate_factors(
        _plan(options, folder, adapter, dataset, rows.rows),
        rows,
        ranks=ranks_of(options.trainer),
        shards=1 if options.shard is None else parse_shard(options.shard)[1],
        width=chosen.width,
        drawn=chosen.labels == "drawn",
        settings={"data": options.data, "out": options.out, **asdict(chosen), "rows": rows.num_rows}
        | {"batch_size": options.batch_size, "max_tokens": options.max_tokens},
    )


def _plan(
    options: GradientsOptions | FactorsOptions,
    folder: ModelFolder,
    adapter: Path | None,
    dataset: Any,
    rows: Sequence[int],
) -> Plan:
    """The model on the meta device, and some of the rows."""
    lora = None if adapter is None else _lora_settings(adapter)
    return Plan.of(
        empty_model(folder, lora=lora, target=options.target, trust_remote_code=options.trust_remote_code),
        dataset,
        rows,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        dtype=resolved_dtype(options.model_dtype),
        quantize=options.quantize,
        attention=options.attention,
        gradient_checkpointing=options.gradient_checkpointing,
        base_shards=sharing_ranks(options.trainer, ranks_of(options.trainer)),
    )


def _lora_settings(adapter: Path) -> LoraSettings:
    """Rank and targets of a saved adapter; a list of layer names (LLaVA's) means the language model's linear layers."""
    saved = json.loads((adapter / "adapter_config.json").read_text())
    targets = saved.get("target_modules")
    return LoraSettings(rank=saved["r"], targets=targets if isinstance(targets, str) else None)


def evenly(rows: Sequence[int], most: int = 256) -> list[int]:
    """Evenly spaced rows, which stand for all.

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
