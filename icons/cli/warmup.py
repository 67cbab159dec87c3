"""`icons warmup`: LoRA fine-tuning, on a random share of the data (the warm-up) or on all of it (the fine-tune)."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from icons.cli.cost import ModelSize, Workload
from icons.cli.estimate import evenly, plan_warmup
from icons.datamodules.datamodule import ConversationDataModule
from icons.datamodules.preprocessing import Preprocessing
from icons.models.folder import ModelFolder
from icons.models.loading import empty_model, load_model
from icons.models.lora import LoraSettings
from icons.models.warmup_folder import is_warmup, save_warmup
from icons.modules.fit import (
    already_done,
    console,
    losses_of,
    ranks_of,
    remove,
    resolved_dtype,
    run_fit,
    say,
    show_losses,
    trainer_flags,
)
from icons.modules.fit_checkpoint import LAST
from icons.modules.warmup import WarmupModule
from icons.output import check_output, mark
from icons.store.manifest import versions

HELD_OUT, MOST_HELD_OUT = "held-out", 256


def warmup(
    model: Path,
    data: Path,
    out: Path,
    images: Path | None = None,
    vision_tower: Path | None = None,
    mm_projector: Path | None = None,
    fraction: float = 1.0,
    min_rows: int = 256,
    held_out: float = 0.02,
    task: list[str] | None = None,
    epochs: int = 1,
    batch_size: int = 16,
    accumulate: int = 1,
    learning_rate: float = 2e-4,
    projector_learning_rate: float = 2e-5,
    warmup_ratio: float = 0.03,
    weight_decay: float = 0.0,
    lora_rank: int = 128,
    lora_alpha: float = 256.0,
    lora_dropout: float = 0.05,
    lora_targets: str | None = None,
    train_projector: bool = True,
    template: str = "auto",
    max_length: int = 2048,
    preset: Literal["llava-train", "icons-release"] = "llava-train",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    quantize: Literal["4bit", "8bit"] | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    num_workers: int = 0,
    seed: int = 0,
    checkpoint_minutes: float = 15.0,
    resume: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    trainer: dict[str, Any] | None = None,
) -> int:
    """Trains LoRA (and the projector) as LLaVA does, and keeps the adapter with Adam's moments in a warm-up folder.

    The same line, run again, goes on where a fit was interrupted. Exit status 75 means: interrupted (SIGTERM) and
    saved, run the same line again.

    Args:
        model: Hugging Face folder, or an original LLaVA base folder (with --vision-tower and --mm-projector).
        data: LLaVA JSON or JSONL.
        out: the warm-up folder to write.
        images: folder (or tar or zip archive) that the records' image paths start from.
        vision_tower: CLIP folder of an original LLaVA model.
        mm_projector: mm_projector.bin of an original LLaVA model.
        fraction: random share of the data to train on; 0.05 for the paper's warm-up, 1 for the final fine-tune.
        min_rows: a share of fewer rows is raised to this many; two steps of 128 are the least to learn from.
        held_out: without tasks, share of the data to measure the loss on and not to train on; at most 256 rows.
        task: NAME=FILE or NAME=FILE:IMAGES, repeatable: files to measure loss and exact matches on, before and after.
        epochs: passes over the chosen rows.
        batch_size: rows per device and step.
        accumulate: batches per optimizer step.
        learning_rate: of the adapter.
        projector_learning_rate: of the projector between vision tower and language model.
        warmup_ratio: share of the steps in which the learning rate rises; after them it falls as a cosine.
        weight_decay: on the adapter's and projector's matrices.
        lora_rank: r.
        lora_alpha: scaling is alpha / r.
        lora_dropout: on the adapter's input.
        lora_targets: regular expression over module names; default: the language model's linear layers.
        train_projector: train the projector too, as LLaVA does.
        template: conversation template; auto: the one that the model folder calls for.
        max_length: tokens at which a conversation is cut.
        preset: llava-train prepares data as LLaVA is trained; icons-release as the released ICONS scripts do.
        dtype: of the frozen weights and the computation; auto: bfloat16 on a GPU, float32 on a CPU.
        attention: attention kernel; flash_attention_2 needs the extra `flash`.
        quantize: frozen weights in 4 or 8 bits; needs the extra `quantize`.
        gradient_checkpointing: recompute activations in the backward pass, for less memory.
        trust_remote_code: run code that comes with the model folder.
        num_workers: processes that read and decode ahead.
        seed: of the choice of rows, their order, the adapter's first values and dropout.
        checkpoint_minutes: between two checkpoints of the fit.
        resume: go on with an interrupted fit in --out; false starts again.
        overwrite: write --out even if something lies there that is no former warm-up.
        dry_run: print what would be done (settings, rows per rank, bytes, memory, time) and stop.
        trainer: flags of Lightning's Trainer.
    """
    ranks, computed_in = ranks_of(trainer), resolved_dtype(dtype)
    folder = ModelFolder.open(model, vision_tower=vision_tower, mm_projector=mm_projector)
    lora = LoraSettings(lora_rank, lora_alpha, lora_dropout, lora_targets, seed)
    target: Literal["lora", "trainable"] = "trainable" if train_projector else "lora"
    tasks = parse_tasks(task or [])
    check_output(
        out,
        kind="folder",
        inputs={
            "--model": model, "--data": data, "--vision-tower": vision_tower, "--mm-projector": mm_projector,
            "--task": [file for file, _ in tasks.values()],
        },
        searched={"--images": images, "--task": [folder for _, folder in tasks.values() if folder is not None]},
        ours=is_warmup,
        overwrite=overwrite,
    )  # fmt: skip
    flags = trainer_flags(trainer or {}, epochs, accumulate, computed_in)
    datamodule = ConversationDataModule(
        data,
        images,
        model_folder=folder,
        preprocessing=Preprocessing(
            template=folder.template if template == "auto" else template, max_length=max_length, preset=preset
        ),
        batch_size=batch_size,
        num_workers=num_workers,
        tasks=tasks,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    num_rows = len(datamodule.dataset)
    rows, held = draw(num_rows, fraction, min_rows, 0.0 if tasks else held_out, seed)
    datamodule.rows, datamodule.held_out = rows, held or None
    settings = {
        "fraction": fraction, "rows": len(rows), "held_out": len(held), "tasks": sorted(tasks),
        "epochs": epochs, "batch_size": batch_size, "accumulate": accumulate, "ranks": ranks,
        "learning_rate": learning_rate, "projector_learning_rate": projector_learning_rate,
        "warmup_ratio": warmup_ratio, "weight_decay": weight_decay, "lora": asdict(lora), "target": target,
        "dtype": computed_in, "attention": attention, "quantize": quantize, "seed": seed,
        "preprocessing": datamodule.preprocessing.as_dict(), "model_fingerprint": folder.fingerprint(),
        "data_fingerprint": datamodule.describe()["data"]["fingerprint"], "trainer": plain(trainer or {}),
    }  # fmt: skip
    share = f"{len(rows):,} of {num_rows:,} rows ({len(rows) / num_rows:.1%})"
    if len(rows) > math.ceil(fraction * num_rows):
        say(f"[yellow]{fraction:.1%} of {num_rows:,} rows is little to learn from: taking {share}[/] (--min-rows)")
    if dry_run:
        empty = empty_model(folder, lora=lora, target=target, trust_remote_code=trust_remote_code)
        size = ModelSize.of(empty, folder.image_tokens)
        lengths = datamodule.dataset.lengths(evenly(rows))
        load = Workload(lengths, batch_size, None, computed_in, quantize, attention, gradient_checkpointing)
        work = {"num_rows": len(rows), "ranks": ranks, "accumulate": accumulate, "epochs": epochs}
        files = {"model": model, "data": data, "images": images, "out": out}
        plan_warmup(size, load, **work, settings=files | settings).show(console)
        return 0
    if resume and already_done(out, settings):
        say(f"{out} holds this very fit, finished: nothing to do (--resume false to start again)")
        return 0
    mark(out, "warmup")
    network = load_model(
        folder,
        lora=lora,
        dtype=computed_in,
        attention=attention,
        quantize=quantize,
        gradient_checkpointing=gradient_checkpointing,
        target=target,
        trust_remote_code=trust_remote_code,
    )
    module = WarmupModule(
        network,
        learning_rate=learning_rate,
        projector_learning_rate=projector_learning_rate,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        tasks=list(tasks) or ([HELD_OUT] if held else []),
        settings=settings,
    )
    say(f"training on {share}, {epochs} epoch{'s' * (epochs > 1)}")
    ended = run_fit(module, datamodule, flags, out, minutes=checkpoint_minutes, seed=seed, resume=resume)
    if isinstance(ended, int):
        return ended
    if ended.is_global_zero:
        assert module.outcome is not None
        used = {"rows": len(rows), "fraction": len(rows) / num_rows, "steps": ended.global_step}
        manifest = (
            datamodule.describe() | losses_of(module) | {"settings": settings, "lora": asdict(lora), "used": used}
        )
        manifest |= {"versions": versions()}
        save_warmup(out, network, module.outcome, folder, manifest)
        if module.outcome.exp_avg:  # else they are in DeepSpeed's checkpoint alone
            remove(out / LAST)
        show_losses(module)
        say(f"{ended.global_step:,} steps; the adapter and Adam's moments are in {out}")
    return 0


def draw(num_rows: int, fraction: float, min_rows: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """The rows to train on and the rows to measure on, both ascending and without a row in common.

    One seeded order of all rows gives both: training rows from its front, so that a larger fraction contains a smaller
    one; held-out rows from its end.

    Args:
        num_rows: rows of the data file.
        fraction: share to train on (rounded up); 1 means all but the held-out rows.
        min_rows: a share of fewer rows is raised to this many, as far as there are rows.
        held_out: share to measure on (rounded up), at most 256 rows; 0: none.
        seed: of the order.

    Raises:
        ValueError: a share is outside its range.

    >>> draw(10, 0.2, 1, 0.1, seed=0)
    ([4, 6], [1])
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"--fraction {fraction}: expected a share of the rows, above 0 and at most 1")
    if not 0 <= held_out < 1:
        raise ValueError(f"--held-out {held_out}: expected a share of the rows, from 0 to below 1")
    order = np.random.default_rng(seed).permutation(num_rows)
    measured = min(MOST_HELD_OUT, math.ceil(held_out * num_rows), num_rows - 1)
    trained = min(max(math.ceil(fraction * num_rows), min_rows), num_rows - measured)
    return sorted(order[:trained].tolist()), sorted(order[num_rows - measured :].tolist())


def parse_tasks(words: Sequence[str]) -> dict[str, tuple[Path, Path | None]]:
    """`NAME=FILE` or `NAME=FILE:IMAGES` -> name -> (file, image folder).

    Raises:
        ValueError: a word of another form, or a name given twice.
        FileNotFoundError: no such file.
    """
    tasks: dict[str, tuple[Path, Path | None]] = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not name or not equals or not place:
            raise ValueError(f"--task {word}: expected NAME=FILE or NAME=FILE:IMAGES")
        if name in tasks:
            raise ValueError(f"--task {word}: the name {name} is given twice; give each task a name of its own")
        file, _, images = place.partition(":")
        if not Path(file).is_file():
            raise FileNotFoundError(f"--task {word}: no file {file}; expected LLaVA JSON or JSONL")
        tasks[name] = Path(file), Path(images) if images else None
    return tasks


def plain(flags: dict[str, Any]) -> dict[str, Any]:
    """Trainer flags as JSON can hold them; objects (strategies, callbacks) by their class."""
    kept = (str, int, float, bool, type(None))
    return {name: value if isinstance(value, kept) else type(value).__name__ for name, value in flags.items()}
