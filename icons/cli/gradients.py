"""`icons gradients`: per-sample gradients of a data file into a gradient store, through `Trainer.predict`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning import Trainer
from rich.console import Console
from rich.markup import escape

from icons.cli.estimate import plan_gradients_run
from icons.cli.model_source import ModelSource
from icons.datamodules.datamodule import ConversationDataModule
from icons.modules.collector import DIFFERENTIATED, Collect, collector
from icons.modules.fit import quiet
from icons.modules.part_writer import PartWriter, part_path
from icons.modules.writer import GradientWriter
from icons.output import check_output
from icons.partition import assign, parse_shard
from icons.preconditioner import AdamPreconditioner
from icons.projection import PROJECTORS, Several
from icons.store import GradientStore, ScoreStore, fitting_chunk_rows
from icons.store.former import holds_store

console = Console()
TRAINER = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
# 7B in bfloat16, r = 128: 45 GB of activations beside 20 GB of weights and the like (icons/gradients/per_sample.py)
MAX_TOKENS = 8192
FIXED = {"inference_mode": False, "use_distributed_sampler": False}


def gradients(
    data: Path,
    out: str,
    images: Path | None = None,
    checkpoint: Path | None = None,
    model: Path | None = None,
    vision_tower: Path | None = None,
    mm_projector: Path | None = None,
    adapter: Path | None = None,
    optimizer_state: Path | None = None,
    target: Literal["lora", "trainable"] = "lora",
    collect: Collect = "gradients",
    projector: Literal["count_sketch", "rademacher", "gaussian"] = "count_sketch",
    dim: int | list[int] = 5120,
    seed: int = 0,
    preconditioner: Literal["adam", "diagonal", "sign", "none"] = "adam",
    dtype: Literal["float16", "float32", "int8"] = "float16",
    chunk_rows: int | None = None,
    codec: str | None = None,
    batch_size: int = 8,
    max_tokens: int | None = MAX_TOKENS,
    template: str | None = None,
    max_length: int | None = None,
    preset: Literal["llava-train", "icons-release"] | None = None,
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    quantize: Literal["4bit", "8bit"] | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    trust_remote_code: bool = False,
    num_workers: int = 0,
    shard: str | None = None,
    retry_failed: bool = False,
    mixed_batches: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    trainer: dict[str, Any] | None = None,
) -> int:
    """Computes a store of projected per-sample gradients; the same line, run again, resumes.

    Exit status 75 means: interrupted (SIGTERM), run the same line again.

    Args:
        data: LLaVA JSON or JSONL; row i of the store is record i of this file.
        out: the gradient store: a folder, or a URL (s3://bucket/name).
        images: folder (or tar or zip archive) that the records' image paths start from.
        checkpoint: warm-up folder; in its place --model and --adapter name the parts.
        model: Hugging Face folder, or an original LLaVA base folder (with --vision-tower and --mm-projector).
        vision_tower: CLIP folder of an original LLaVA model.
        mm_projector: mm_projector.bin of an original LLaVA model.
        adapter: LoRA adapter folder (PEFT's, LLaVA's, or a checkpoint-N of the Hugging Face Trainer).
        optimizer_state: Adam's moments: warm-up folder, Lightning checkpoint, optimizer.pt, or DeepSpeed folder.
        target: differentiate the LoRA parameters, as the paper does, or all that the warm-up trained.
        collect: what a row holds: gradients; representations (the last token's hidden state); the loss alone; or
            image_ablation, gradients with noise in place of the image. In the original, --info_type: grads / reps /
            loss / delta.
        projector: kind of random projection of gradients.
        dim: numbers per row of gradients (K); the paper's is 5120. Given several times: that many stores from one pass,
            OUT-dim1024, OUT-dim5120. In the original, --gradient_projection_dimension.
        seed: of the projection (and of the noise of image_ablation); training and task stores need the same.
        preconditioner: of gradients: adam (training data) or none (tasks); diagonal is Adam's without its first moment.
            In the original, --gradient_type: adam / sgd / sign are adam / none / sign here.
        dtype: of the stored rows.
        chunk_rows: rows per chunk, the unit of writing and resuming; default: so that a chunk has 2 to 16 MB.
        codec: compression of the rows (for example zstd); default none, since gradients hardly compress.
        batch_size: most rows per batch.
        max_tokens: most tokens per batch, padding included; null: no limit. With the default a 7B model in bfloat16
            fits an 80 GB GPU, and with --gradient-checkpointing one of 48 GB.
        template: conversation template; default: as in the warm-up, or the model's own.
        max_length: tokens at which a conversation is cut.
        preset: llava-train prepares data as LLaVA is trained; icons-release as the released ICONS scripts do.
        model_dtype: of the model's weights; auto: as stored on a CPU, bfloat16 on a GPU.
        attention: attention kernel; flash_attention_2 needs the extra `flash`.
        quantize: base weights in 4 or 8 bits; needs the extra `quantize`.
        gradient_checkpointing: recompute activations in the backward pass, for less memory.
        compile: fuse the elementwise part of --preconditioner adam with torch.compile (half a minute at the start).
        trust_remote_code: run code that comes with the model folder.
        num_workers: processes that read and decode ahead.
        shard: I/N: only this share of the units, without any communication (array jobs); I counts from 0.
        retry_failed: also compute the rows that failed before.
        mixed_batches: go on with a store that was begun with another --batch-size or --max-tokens, say because memory
            ran out; its rows are then equal to rounding, not bit for bit, to those of an undisturbed run.
        strict: exit with 1 when a row failed.
        overwrite: write --out even if something else lies there; a store of other settings is replaced.
        dry_run: print what would be done (rows per rank, bytes, memory) and stop.
        trainer: flags of Lightning's Trainer.
    """
    source = ModelSource.resolve(
        checkpoint=checkpoint,
        model=model,
        vision_tower=vision_tower,
        mm_projector=mm_projector,
        adapter=adapter,
        optimizer_state=optimizer_state,
        preprocessing={"template": template, "max_length": max_length, "preset": preset},
    )
    if source.warning:
        console.print(f"[yellow]warning:[/] {escape(source.warning)}", soft_wrap=True)
    differentiates = collect in DIFFERENTIATED
    if not differentiates:
        console.print(f"{collect}: stored as it is; --projector, --dim and --preconditioner are for gradients")
    dims = dimensions(dim) if differentiates else [1]
    outs = [out] if len(dims) == 1 else [part_path(out, size) for size in dims]
    inputs = {
        "--data": data, "--checkpoint": checkpoint, "--model": model, "--vision-tower": vision_tower,
        "--mm-projector": mm_projector, "--adapter": adapter, "--optimizer-state": optimizer_state,
    }  # fmt: skip
    for place in outs:
        check_output(
            place,
            kind="folder",
            inputs=inputs,
            searched={"--images": images},
            ours=partial(holds_store, kind=GradientStore.KIND),
            overwrite=replaces(overwrite, shard),
        )
    flags = predict_flags(trainer)
    datamodule = ConversationDataModule(
        data,
        images,
        model_folder=source.folder,
        preprocessing=source.preprocessing,
        batch_size=batch_size,
        max_tokens=max_tokens,
        num_workers=num_workers,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        plan = plan_gradients_run(
            source.folder, source.adapter, datamodule.dataset, target=target, collect=collect, dim=dims,
            projector=projector, store_dtype=dtype, preconditioner=preconditioner, batch_size=batch_size,
            max_tokens=max_tokens, model_dtype=model_dtype, attention=attention, quantize=quantize,
            gradient_checkpointing=gradient_checkpointing,
            trust_remote_code=trust_remote_code, chunk_rows=chunk_rows, shard=shard, trainer=trainer,
            settings={"data": data, "out": ", ".join(outs), "collect": collect, "batch_size": batch_size,
                "max_tokens": max_tokens},
        )  # fmt: skip
        plan.show(console)
        return 0
    network = source.load(
        target=target,
        dtype=model_dtype,
        attention=attention,
        quantize=quantize,
        gradient_checkpointing=gradient_checkpointing,
        trust_remote_code=trust_remote_code,
    )
    several = [PROJECTORS[projector](size, seed=seed) for size in dims]
    state = source.preconditioner(preconditioner, network) if differentiates else None
    if isinstance(state, AdamPreconditioner):
        state.compiled = compile
    extractor = collector(collect, network, several[0] if len(several) == 1 else Several(several), state)
    writing: dict[str, Any] = {
        "dtype": dtype,
        "chunk_rows": chunk_rows,
        "codec": codec,
        "shard": shard,
        "retry_failed": retry_failed,
        "mixed_batches": mixed_batches,
        "overwrite": overwrite,
        "manifest": {"target": target, "warnings": [source.warning] if source.warning else []},
    }
    if len(dims) == 1:
        writers = [GradientWriter(out, **writing)]
    else:  # units of the same rows, as they suit the longest rows
        writing["chunk_rows"] = chunk_rows or fitting_chunk_rows(len(datamodule.dataset), max(dims), dtype)
        writers = [PartWriter(path, part, **writing) for part, path in enumerate(outs)]
    with quiet():
        runner = Trainer(**flags)
        runner.callbacks.extend(writers)  # type: ignore[attr-defined]
        runner.predict(extractor, datamodule=datamodule, return_predictions=False)
    return max(summary(GradientStore.open(path), strict, shard) for path in outs) if runner.is_global_zero else 0


def replaces(overwrite: bool, shard: str | None) -> bool:
    """--overwrite, which one of many jobs on one store cannot mean.

    Raises:
        ValueError: with --shard.
    """
    if overwrite and shard is not None:
        raise ValueError(
            "--overwrite: together with --shard each job would take away what the others have written; delete the "
            "store before the jobs start"
        )
    return overwrite


def dimensions(dim: int | Sequence[int]) -> list[int]:
    """The dimensions asked for.

    Raises:
        ValueError: one is given twice.

    >>> dimensions(64), dimensions([64, 32])
    ([64], [64, 32])
    """
    dims = [dim] if isinstance(dim, int) else list(dim)
    if not dims or len(set(dims)) != len(dims):
        raise ValueError(f"--dim: got {dims}; expected each dimension once, since each becomes a store of its own")
    return dims


def predict_flags(trainer: dict[str, Any] | None) -> dict[str, Any]:
    """The Trainer's flags: ours, then the user's, who may not change those that gradients depend on.

    Raises:
        ValueError: such a flag is given with another value.
    """
    for flag, value in FIXED.items():
        if (trainer or {}).get(flag, value) != value:
            raise ValueError(
                f"--trainer.{flag}: expected {value}; gradients cannot be computed otherwise, leave it out"
            )
    return TRAINER | (trainer or {}) | FIXED


def summary(store: GradientStore | ScoreStore, strict: bool, shard: str | None = None) -> int:
    """Prints how many rows are done, failed (with their reasons) and missing; the exit status that follows from it.

    With a shard, what other shards have still to do is not missing.
    """
    failed = {status.name.lower(): len(rows) for status, rows in store.failed().items()}
    console.print(repr(store), markup=False, highlight=False, soft_wrap=True)
    for reason, count in failed.items():
        console.print(f"[yellow]failed[/] {count:,} rows: {reason}")
    index, count = (0, 1) if shard is None else parse_shard(shard)
    missing = set(assign(range(store.partition.num_units), count, index)) & set(store.missing())
    return int(bool(missing) or (strict and bool(failed)))
