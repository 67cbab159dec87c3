"""`icons warmup`: LoRA fine-tuning, on a random share of the data (the warm-up) or on all of it (the fine-tune)."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table

from icons.choices import Target
from icons.cli.console import bars, console, warn
from icons.cli.estimate import Plan, estimate_warmup, evenly
from icons.cli.options.warmup import WarmupOptions
from icons.cli.pairs import files_of
from icons.datamodules.datamodule import ConversationDataModule
from icons.datamodules.preprocessing import Preprocessing
from icons.manifest import versions
from icons.models.folder import ModelFolder
from icons.models.loading import empty_model, load_model
from icons.models.lora import LoraSettings
from icons.models.warmup_folder import is_warmup, save_warmup
from icons.modules.failed_rows import FailedRows
from icons.modules.fit import TRAINER as TRAINER
from icons.modules.fit import (
    already_done,
    losses_of,
    ranks_of,
    resolved_dtype,
    run_fit,
    say,
    trainer_flags,
)
from icons.modules.fit_checkpoint import BEFORE, LAST, NEW
from icons.modules.fit_lock import alone_in, others_wait
from icons.modules.named_strategy import sharing_ranks
from icons.modules.warmup import WarmupModule, hardly_moved
from icons.output import check_output, mark, remove
from icons.terminal import counted

_HELD_OUT, _MOST_HELD_OUT = "held-out", 256


def warmup(options: WarmupOptions) -> int:
    """Trains LoRA (and the projector) as LLaVA does, and keeps the adapter with Adam's moments in a warm-up folder."""
    ranks, computed_in = ranks_of(options.trainer), resolved_dtype(options.dtype)
    folder = ModelFolder.open(options.model, vision_tower=options.vision_tower, mm_projector=options.mm_projector)
    lora = LoraSettings(options.lora_rank, options.lora_alpha, options.lora_dropout, options.lora_targets, options.seed)
    target: Target = "trainable" if options.train_projector else "lora"
    tasks = files_of(options.task)
    check_output(
        options.out,
        kind="folder",
        inputs={**options.model_files, "--data": options.data, "--task": [file for file, _ in tasks.values()]},
        searched={"--images": options.images, "--task": [folder for _, folder in tasks.values() if folder is not None]},
        ours=is_warmup,
        overwrite=options.overwrite,
    )
    flags = trainer_flags(bars() | options.trainer, options.epochs, options.accumulate, computed_in)
    datamodule = ConversationDataModule(
        options.data,
        options.images,
        model_folder=folder,
        preprocessing=Preprocessing(
            template=folder.template if options.template == "auto" else options.template,
            max_length=options.max_length,
            preset=options.preset,
            processor=options.processor or {},
        ),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        tasks=tasks,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
        **options.reading,
    )
    say(datamodule.dataset.summary())
    num_rows = len(datamodule.dataset)
    rows, held = draw(num_rows, options.fraction, options.min_rows, 0.0 if tasks else options.held_out, options.seed)
    datamodule.rows, datamodule.held_out = rows, held or None
    settings = {
        "fraction": options.fraction, "rows": len(rows), "held_out": len(held), "tasks": sorted(tasks),
        "epochs": options.epochs, "batch_size": options.batch_size, "accumulate": options.accumulate, "ranks": ranks,
        "learning_rate": options.learning_rate, "projector_learning_rate": options.projector_learning_rate,
        "warmup_ratio": options.warmup_ratio, "weight_decay": options.weight_decay, "lora": asdict(lora),
        "target": target,
        "dtype": computed_in, "attention": options.attention, "quantize": options.quantize, "seed": options.seed,
        "preprocessing": datamodule.preprocessing.as_dict(), "model_fingerprint": folder.fingerprint(),
        "data_fingerprint": datamodule.describe()["data"]["fingerprint"], "trainer": plain(options.trainer or {}),
    }  # fmt: skip
    share = f"{len(rows):,} of {num_rows:,} rows ({len(rows) / num_rows:.1%})"
    if len(rows) > math.ceil(options.fraction * num_rows):
        asked = f"{options.fraction:.1%} of {num_rows:,} rows"
        say(f"{asked} is little to learn from: taking {share} (--min-rows)")
    if options.dry_run:
        empty = empty_model(folder, lora=lora, target=target, trust_remote_code=options.trust_remote_code)
        plan = Plan.of(
            empty,
            datamodule.dataset,
            rows,
            batch_size=options.batch_size,
            dtype=computed_in,
            quantize=options.quantize,
            attention=options.attention,
            gradient_checkpointing=options.gradient_checkpointing,
            base_shards=sharing_ranks(options.trainer, ranks),
        )
        work = {"num_rows": len(rows), "ranks": ranks, "accumulate": options.accumulate, "epochs": options.epochs}
        files = {"model": options.model, "data": options.data, "images": options.images, "out": options.out}
        estimate_warmup(plan, **work, settings=files | settings).show(console)
        return 0
    made_from = settings, datamodule.image_marks, datamodule.describe_tasks()
    if options.resume and already_done(options.out, *made_from):
        say(f"{options.out} holds this very fit, finished: nothing to do (--resume false to start again)")
        return 0
    datamodule.dataset.check_some(evenly(rows))
    failed = FailedRows(len(rows), options.max_failed)
    flags["callbacks"] = [failed, *flags["callbacks"]]
    mark(options.out, "warmup")
    network = load_model(folder, lora=lora, dtype=computed_in, target=target, **options.loading)
    module = WarmupModule(
        network,
        learning_rate=options.learning_rate,
        projector_learning_rate=options.projector_learning_rate,
        warmup_ratio=options.warmup_ratio,
        weight_decay=options.weight_decay,
        tasks=list(tasks) or ([_HELD_OUT] if held else []),
        settings=settings,
        image_files=made_from[1],
        task_files=made_from[2],
    )
    say(f"training on {share}, {counted(options.epochs, 'epoch')}")
    with alone_in(options.out) as refused:
        try:
            if refused is None and options.resume and already_done(options.out, *made_from):
                if not others_wait(ranks):
                    say(f"{options.out} holds this very fit, finished by another run: nothing to do")
                    return 0
                raise ValueError(f"{options.out}: another run has finished this fit meanwhile; run the same line again")
        except ValueError as error:
            refused = error
        if refused is not None and not others_wait(ranks):
            raise refused
        ended = run_fit(
            module,
            datamodule,
            flags,
            options.out,
            minutes=options.checkpoint_minutes,
            seed=options.seed,
            resume=options.resume,
            refused=refused,
        )
        if isinstance(ended, int):
            return ended
        failures, lines = failed.describe(ended), failed.lines(ended)
        if ended.is_global_zero:
            assert module.outcome is not None
            used = {"rows": len(rows), "fraction": len(rows) / num_rows, "steps": ended.global_step}
            manifest = (
                datamodule.describe() | losses_of(module) | {"settings": settings, "lora": asdict(lora), "used": used}
            )
            manifest |= {"tasks": module.task_files, "versions": versions(), "failed": failures}
            save_warmup(options.out, network, module.outcome, folder, manifest)
            for name in (BEFORE, NEW, *([LAST] if module.outcome.exp_avg else [])):  # else DeepSpeed's alone has them
                remove(options.out / name)
            for line in lines:
                warn(line)
            _show_losses(module, is_warmup=options.fraction < 1)  # the final fine-tune starts where others ended
            steps = counted(ended.global_step, "step")
            say(f"{steps}; the adapter and Adam's moments are in {options.out}")
    return 0


def _show_losses(module: WarmupModule, is_warmup: bool) -> None:
    """Prints the tasks' losses and exact matches; loudly, when the loss of a warm-up has hardly moved."""
    if module.after:
        table = Table("task", "rows", "loss before", "after", "exact before", "after")
        for task, after in module.after.items():
            before = module.before.get(task, {})
            loss, exact = before.get("loss", float("nan")), before.get("accuracy", float("nan"))
            numbers = [f"{loss:.4f}", f"{after['loss']:.4f}", f"{exact:.1%}", f"{after['accuracy']:.1%}"]
            table.add_row(task, f"{after['rows']:,.0f}", *numbers)
        console.print(table)
    warning = hardly_moved(*losses_of(module)["losses"].values())
    if warning and is_warmup:
        warn(warning)


def retrain(**options: Any) -> int:
    """`warmup` by the names of its options; importable, since it goes to worker processes."""
    return warmup(WarmupOptions(**options))


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
    measured = min(_MOST_HELD_OUT, math.ceil(held_out * num_rows), num_rows - 1)
    trained = min(max(math.ceil(fraction * num_rows), min_rows), num_rows - measured)
    return sorted(order[:trained].tolist()), sorted(order[num_rows - measured :].tolist())


def plain(flags: dict[str, Any]) -> dict[str, Any]:
    """Trainer flags as JSON can hold them; objects (strategies, callbacks) by their class."""
    kept = (str, int, float, bool, type(None))
    return {name: value if isinstance(value, kept) else type(value).__name__ for name, value in flags.items()}
