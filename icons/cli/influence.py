"""`icons influence`: gradient stores of training rows and tasks -> a score store, with error bars."""

from functools import partial
from typing import Literal

import numpy as np
from lightning.fabric import Fabric
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from icons.cli.pairs import parse, places
from icons.modules.scoring import Scoring, blocks_of
from icons.output import check_output
from icons.store import ScoreStore
from icons.store.former import holds_store

console = Console()


def influence(
    train: list[str],
    task: list[str],
    out: str,
    normalize: Literal["projected", "exact", "none"] = "projected",
    task_normalize: Literal["projected", "exact", "none"] | None = None,
    weights: list[float] | None = None,
    group: list[str] | None = None,
    reduce: Literal["max", "mean"] = "max",
    pairwise: bool = False,
    top_pairs: int = 0,
    chunk_rows: int | None = None,
    accelerator: str = "auto",
    devices: str = "1",
    num_nodes: int = 1,
    strategy: str = "auto",
    overwrite: bool = False,
) -> int:
    """Scores every training row on every task: the mean cosine of their gradients. The same line, run again, resumes.

    Args:
        train: gradient store of the training data; again for each further checkpoint.
        task: NAME=STORE, a task and the gradient store of its validation rows; again for each task. Several
            checkpoints: NAME=STORE1,STORE2 in the order of --train.
        out: the score store: a folder, or a URL (s3://bucket/name).
        normalize: divide each training row by its projected norm (the original, and LESS), by its exact norm, or not.
        task_normalize: the same for validation rows; default: as for training rows.
        weights: of the checkpoints, once for each --train (LESS: their learning rates); default: the mean.
        group: NAME=TASK1,TASK2,... is one task made of several, as MME of its subtasks; again for each group.
        reduce: a group's influence is its tasks' highest (as the original does for MME), or their mean.
        pairwise: also store each training row's product with each single validation row.
        top_pairs: keep this many strongest validation rows for each training row and task, to see why.
        chunk_rows: rows per chunk of the score store, the unit of writing and resuming; default about 16,000.
        accelerator: where the products are computed (Lightning: auto, cpu, gpu, ...).
        devices: number of devices or processes per machine, or a list of them.
        num_nodes: number of machines.
        strategy: Lightning Fabric's strategy.
        overwrite: write --out even if something else lies there; a score store of other settings is replaced.
    """
    if top_pairs < 0:
        raise ValueError(f"--top-pairs {top_pairs}: expected 0 or more")
    tasks = {name: paths.split(",") for name, paths in parse(task, "--task").items()}
    groups = {name: members.split(",") for name, members in parse(group or [], "--group").items()}
    inputs = {"--train": train, "--task": places(task)}
    check_output(
        out, kind="folder", inputs=inputs, ours=partial(holds_store, kind=ScoreStore.KIND), overwrite=overwrite
    )
    scoring = Scoring(
        train, tasks, out, normalize, task_normalize, weights, groups, reduce, pairwise, top_pairs, chunk_rows,
        overwrite,
    )  # fmt: skip
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy)
    fabric.launch()
    columns = (TextColumn("influence"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not fabric.is_global_zero) as progress:
        bar = progress.add_task("rows", total=None)

        def advance(rows: int) -> None:
            progress.advance(bar, rows)

        scores = scoring.run(fabric, advance)
        progress.update(bar, total=scores.num_rows, completed=scores.num_rows)
    if fabric.is_global_zero:
        report(scores)
    return 0


def report(scores: ScoreStore) -> None:
    """Prints, per task, how far the scores spread and how large their projection error is."""
    counts = scores.counts()
    failed = f", {counts['failed']:,} failed (no score)" if counts["failed"] else ""
    console.print(f"{scores.path}: {counts['done']:,} rows scored on {len(scores.tasks)} tasks{failed}", soft_wrap=True)
    total = np.zeros((3, len(scores.tasks)))
    for influence, stderr in zip(blocks_of(scores, "influence"), blocks_of(scores, "stderr"), strict=True):
        values = np.stack([influence, influence**2, stderr**2]).astype(np.float64)
        total += np.nansum(values, axis=1)
    mean, square, error = total / max(counts["done"], 1)
    table = Table("task", *(["validation rows"] if "num_validation" in scores.manifest else []))
    for heading in ("mean influence", "spread", "standard error"):
        table.add_column(heading, justify="right")
    for place, name in enumerate(scores.tasks):
        spread = np.sqrt(max(square[place] - mean[place] ** 2, 0))
        cells = [f"{mean[place]:.4f}", f"{spread:.4f}", f"{np.sqrt(error[place]):.4f}"]
        table.add_row(name, f"{scores.manifest['num_validation'][place]:,}", *cells)
    console.print(table)
    for text in scores.manifest.get("warnings", []):
        console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)
