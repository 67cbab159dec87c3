"""`icons score`: exact influence of every training row on every task; no projection, no gradient stores."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import Trainer
from rich.console import Console
from rich.markup import escape

from icons.batch import Status
from icons.cli.gradients import predict_flags, replaces, summary
from icons.cli.model_source import ModelSource
from icons.cli.pairs import parse
from icons.datamodules.datamodule import ConversationDataModule
from icons.modules.exact_scorer import InfluenceScorer, ScoredTasks, columns_of
from icons.modules.fit import quiet
from icons.modules.former_scores import FormerScores
from icons.modules.kept_task_vectors import describe_vectors, find_vectors
from icons.modules.score_writer import ScoreWriter
from icons.modules.writer import GradientWriter
from icons.output import check_output, is_marked, mark
from icons.projection import PROJECTORS
from icons.store import GradientStore, ScoreStore, fitting_chunk_rows
from icons.store.former import holds_store
from icons.store.manifest import check_compatible

console = Console()


def score(
    checkpoint: list[Path],
    data: Path,
    task: list[str],
    out: Path,
    images: Path | None = None,
    task_vectors: Path | None = None,
    reuse: Path | None = None,
    keep_gradients: Path | None = None,
    projector: Literal["count_sketch", "rademacher", "gaussian"] = "count_sketch",
    dim: int = 5120,
    seed: int = 0,
    dtype: Literal["float16", "float32", "int8"] = "float16",
    weights: list[float] | None = None,
    group: list[str] | None = None,
    reduce: Literal["max", "mean"] = "max",
    normalize: Literal["exact", "none"] = "exact",
    target: Literal["lora", "trainable"] = "lora",
    preconditioner: Literal["adam", "diagonal", "sign", "none"] = "adam",
    optimizer_state: list[Path] | None = None,
    chunk_rows: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    vector_dtype: Literal["float32", "bfloat16"] = "float32",
    offload: bool = False,
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    quantize: Literal["4bit", "8bit"] | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    num_workers: int = 0,
    shard: str | None = None,
    retry_failed: bool = False,
    mixed_batches: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    trainer: dict[str, Any] | None = None,
) -> int:
    """Scores every training row on every task exactly; the same line, run again, resumes.

    The score store is what `icons influence` writes (standard error zero): select, compare and report work on it.

    Args:
        checkpoint: warm-up folder; again for each further checkpoint.
        data: LLaVA JSON or JSONL of the training rows.
        task: NAME=FILE or NAME=FILE:IMAGES, a task's validation file and its image folder; again for each task.
        out: the score store.
        images: image folder of the training rows.
        task_vectors: folder where task vectors are kept and found again; default: OUT with `.tasks` behind.
        reuse: a finished score store of the same data and model: its columns are copied, and only tasks that it
            lacks are scored (give all --task and --group that the new store shall have).
        keep_gradients: also write the projected gradients to this store, from the same pass (one checkpoint only).
        projector: kind of random projection, for --keep-gradients.
        dim: numbers per row (K), for --keep-gradients.
        seed: of the projection, for --keep-gradients.
        dtype: of the stored rows, for --keep-gradients.
        weights: of the checkpoints, once for each (LESS: their learning rates); default: the mean.
        group: NAME=TASK1,TASK2,... is one task made of several, as MME of its subtasks; again for each group.
        reduce: a group's influence is its tasks' highest (as the original does for MME), or their mean.
        normalize: divide every gradient by its norm (cosine similarity), or not (inner product).
        target: differentiate the LoRA parameters, as the paper does, or all that the warm-up trained.
        preconditioner: of the training rows; tasks are always plain.
        optimizer_state: Adam's moments, one for each checkpoint; default: the warm-up folder's own.
        chunk_rows: rows per unit of writing and resuming; default 1,024.
        batch_size: most rows per batch.
        max_tokens: most tokens per batch, padding included.
        model_dtype: of the model's weights.
        vector_dtype: of the task vectors, S x P numbers on the device.
        offload: keep the task vectors in the CPU's memory and copy each parameter's part when it is needed.
        attention: attention kernel; flash_attention_2 needs the extra `flash`.
        quantize: base weights in 4 or 8 bits; needs the extra `quantize`.
        gradient_checkpointing: recompute activations in the backward pass, for less memory.
        trust_remote_code: run code that comes with the model folder.
        num_workers: processes that read and decode ahead.
        shard: I/N: only this share of the units, without any communication (array jobs); I counts from 0.
        retry_failed: also compute the rows that failed before.
        mixed_batches: go on with a store that was begun with another --batch-size or --max-tokens; its rows are then
            equal to rounding, not bit for bit, to those of an undisturbed run.
        strict: exit with 1 when a row failed.
        overwrite: write --out and --keep-gradients even if something else lies there; stores of other settings are
            replaced.
        trainer: flags of Lightning's Trainer.
    """
    flags = predict_flags(trainer)
    parts = list(weights or [1 / len(checkpoint)] * len(checkpoint))
    states: list[Path | None] = [*optimizer_state] if optimizer_state else [None] * len(checkpoint)
    if len(parts) != len(checkpoint) or len(states) != len(checkpoint):
        raise ValueError(
            f"--checkpoint: got {len(checkpoint)}, with {len(parts)} --weights and {len(states)} --optimizer-state; "
            "expected one of each for every checkpoint"
        )
    if keep_gradients is not None and len(checkpoint) > 1:
        raise ValueError(
            f"--keep-gradients {keep_gradients}: got {len(checkpoint)} checkpoints; expected one: run it for each alone"
        )
    files = {name: task_file(value) for name, value in parse(task, "--task").items()}
    groups = {name: members.split(",") for name, members in parse(group or [], "--group").items()}
    single = len(checkpoint) == 1
    inputs: dict[str, Any] = {
        "--data": data, "--checkpoint": checkpoint, "--optimizer-state": optimizer_state, "--reuse": reuse,
        "--task": [file for file, _ in files.values()],
    }  # fmt: skip
    common: dict[str, Any] = {"kind": "folder", "overwrite": replaces(overwrite, shard)}
    common |= {"searched": {"--images": images, "--task": [folder for _, folder in files.values() if folder]}}
    check_output(out, inputs=inputs, ours=partial(holds_store, kind=ScoreStore.KIND), **common)
    if keep_gradients is not None:
        own = partial(holds_store, kind=GradientStore.KIND)
        check_output(keep_gradients, "--keep-gradients", inputs={**inputs, "--out": out}, ours=own, **common)
    kept = task_vectors or out.with_name(out.name + ".tasks")
    own = partial(is_marked, command="score")
    check_output(kept, "--task-vectors", inputs={**inputs, "--out": out}, ours=own, **common)
    mark(kept, "score")
    outs = [out if single else out.with_name(f"{out.name}.checkpoint-{place}") for place in range(len(checkpoint))]
    for place, folder in enumerate(checkpoint):
        source = ModelSource.resolve(
            checkpoint=folder,
            model=None,
            vision_tower=None,
            mm_projector=None,
            adapter=None,
            optimizer_state=states[place],
            preprocessing={},
        )
        if source.warning:
            console.print(f"[yellow]warning:[/] {escape(source.warning)}", soft_wrap=True)
        model = source.load(
            target=target,
            dtype=model_dtype,
            attention=attention,
            quantize=quantize,
            gradient_checkpointing=gradient_checkpointing,
            trust_remote_code=trust_remote_code,
        )
        loading: dict[str, Any] = {
            "model_folder": source.folder,
            "preprocessing": source.preprocessing,
            "batch_size": batch_size,
        }
        loading |= {"max_tokens": max_tokens, "num_workers": num_workers, "trust_remote_code": trust_remote_code}
        modules = {name: ConversationDataModule(*places, **loading) for name, places in files.items()}
        manifests = describe_vectors(model, modules, normalize == "exact")
        columns, former = columns_of(files, groups), None
        if reuse is not None:
            path = reuse if single else reuse.with_name(f"{reuse.name}.checkpoint-{place}")
            former = FormerScores.of(ScoreStore.open(path), columns, manifests, reduce)
            columns = {name: members for name, members in columns.items() if name not in former.taken}
            said = f"taken over from {path}: {', '.join(former.taken) or 'no task'}"
            console.print(said, markup=False, soft_wrap=True)
        scored = {name: modules[name] for name in files if any(name in members for members in columns.values())}
        new_groups = {name: members for name, members in groups.items() if name in columns}
        with quiet():
            vectors = find_vectors(
                Trainer(**flags), model, scored, manifests, kept if single else kept / str(place), normalize == "exact"
            )
        tasks = ScoredTasks(vectors, new_groups, reduce, getattr(torch, vector_dtype), offload)
        scorer = InfluenceScorer(
            model,
            tasks,
            source.preconditioner(preconditioner, model),
            unit=normalize == "exact",
            projector=None if keep_gradients is None else PROJECTORS[projector](dim, seed=seed),
        )
        datamodule = ConversationDataModule(data, images, **loading)
        writing: dict[str, Any] = {"chunk_rows": chunk_rows, "shard": shard, "retry_failed": retry_failed}
        writing |= {"mixed_batches": mixed_batches, "overwrite": overwrite, "manifest": {"target": target}}
        with quiet():
            runner = Trainer(**flags)
        if keep_gradients is not None:
            writing["chunk_rows"] = chunk_rows or fitting_chunk_rows(len(datamodule.dataset), dim, dtype)
            runner.callbacks.append(GradientWriter(keep_gradients, dtype=dtype, **writing))  # type: ignore[attr-defined]
        writer = ScoreWriter(outs[place], former=former, groups=groups, **writing)
        runner.callbacks.append(writer)  # type: ignore[attr-defined]
        with quiet():
            runner.predict(scorer, datamodule=datamodule, return_predictions=False)
    if not runner.is_global_zero:
        return 0
    stores = [ScoreStore.open(path) for path in outs]
    return ended(stores[0] if single else weighted_sum(stores, parts, out, overwrite), strict, shard)


def ended(store: ScoreStore, strict: bool, shard: str | None) -> int:
    """Prints the summary; the exit status: 1 if units of this run are missing at its end, with a line that says so."""
    status = summary(store, strict, shard)
    if status and (missing := store.missing()):
        console.print(
            f"[red]{len(missing):,} of {store.partition.num_units:,} units are missing[/]: a process has died, or "
            "another run is computing them; run the same line again"
        )
    return status


def task_file(value: str) -> tuple[Path, Path | None]:
    """FILE or FILE:IMAGES.

    Raises:
        FileNotFoundError: no such file.

    >>> task_file(__file__)[1] is None
    True
    """
    name, _, images = value.partition(":")
    if not Path(name).is_file():
        raise FileNotFoundError(f"--task: no file {name}; expected NAME=FILE or NAME=FILE:IMAGES")
    return Path(name), Path(images) if images else None


def weighted_sum(stores: Sequence[ScoreStore], weights: Sequence[float], out: Path, overwrite: bool) -> ScoreStore:
    """The checkpoints' scores, added up with their weights (LESS, section 4.1: learning rates); made anew if there.

    A row that failed at one checkpoint is failed; a unit that one of them has still to do is missing.
    """
    first = stores[0]
    manifest = {key: value for key, value in first.manifest.items() if key not in ("format", "kind", "arrays")}
    manifest |= {"weights": list(weights), "checkpoints": [store.manifest["adapter"] for store in stores]}
    extra: dict[str, tuple[str, list[tuple[str, int]]]] = {"norm": ("float32", []), "loss": ("float32", [])}
    made: dict[str, Any] = {"num_rows": first.num_rows, "tasks": first.tasks, "manifest": manifest}
    made |= {"chunk_rows": first.partition.chunk_rows, "extra": extra | {"tokens": ("int32", [])}}

    def check(store: ScoreStore) -> None:
        check_compatible(store.manifest, manifest, ("data", "tasks", "weights", "checkpoints"), f"{out}", "this run")

    total = ScoreStore.taken_up(out, check, lambda: ScoreStore.create(out, overwrite=overwrite, **made), overwrite)
    for unit in range(first.partition.num_units):
        rows = first.partition.unit_rows(unit)
        span = slice(rows.start, rows.stop)
        parts = [store.stored("influence", span) for store in stores]
        influence = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        statuses = np.stack([store.stored("status", span) for store in stores])
        status = np.where((statuses == Status.NOT_WRITTEN).any(axis=0), Status.NOT_WRITTEN, statuses.max(axis=0))
        if not status.all():
            continue  # a checkpoint has still to do it
        copied = {name: first.stored(name, span) for name in ("norm", "loss", "tokens")}
        total.write_unit(
            unit, np.asarray(influence, np.float32), first.stored("stderr", span), status.astype(np.uint8), **copied
        )
    return total
