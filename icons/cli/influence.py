"""`icons influence`: gradient stores of training rows and tasks -> a score store, with error bars."""

from dataclasses import fields
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from lightning.fabric import Fabric
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from icons.cli.console import console, tell, warn
from icons.cli.options.influence import InfluenceOptions
from icons.cli.pairs import stores_of
from icons.modules.scoring import Scoring, blocks_of
from icons.output import check_output
from icons.store import ScoreStore
from icons.store.failures import failures_of, told
from icons.store.former import holds_store
from icons.terminal import Console, counted


def influence(options: InfluenceOptions) -> int:
    """Scores every training row on every task: the mean cosine of their gradients."""
    if options.top_pairs < 0:
        raise ValueError(f"--top-pairs {options.top_pairs}: expected 0 or more")
    tasks = stores_of(options.task, "--task")
    inputs = {"--train": options.train, "--task": [*chain(*tasks.values())]}
    check_output(
        options.out,
        kind="folder",
        inputs=inputs,
        ours=partial(holds_store, kind=ScoreStore.KIND),
        overwrite=options.overwrite,
    )
    named: dict[str, Any] = {part.name: getattr(options, part.name) for part in fields(Scoring) if part.name != "tasks"}
    scoring = Scoring(**named, tasks=tasks)
    fabric = Fabric(
        accelerator=options.accelerator, devices=options.devices, num_nodes=options.num_nodes, strategy=options.strategy
    )
    fabric.launch()
    columns = (TextColumn("influence"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal, hidden = Console(stderr=True), not fabric.is_global_zero
    with Progress(*columns, console=terminal, transient=True, disable=hidden) as progress:
        bar = progress.add_task("rows", total=None)

        def advance(rows: int) -> None:
            progress.advance(bar, rows)

        scores = scoring.run(fabric, advance, tell)
        progress.update(bar, total=scores.num_rows, completed=scores.num_rows)
    if fabric.is_global_zero:
        report(scores)
    return 0


def report(scores: ScoreStore) -> None:
    """Prints, per task, how far the scores spread and how large their projection error is."""
    counts = scores.counts()
    failed = f", {counts['failed']:,} failed (no score)" if counts["failed"] else ""
    scored = f"{counted(counts['done'], 'row')} scored on {counted(len(scores.tasks), 'task')}"
    console.print(f"{scores.path}: {scored}{failed}", soft_wrap=True)
    for line in told(failures_of(scores)):
        tell(line, "yellow")
    total = np.zeros((3, len(scores.tasks)))
    for influence, stderr in zip(blocks_of(scores, "influence"), blocks_of(scores, "stderr"), strict=True):
        values = np.stack([influence, influence**2, stderr**2]).astype(np.float64)
        total += np.nansum(values, axis=1)
    mean, square, error = total / max(counts["done"], 1)
    facts = scores.facts
    table = Table("task", *(["validation rows"] if facts.num_validation else []))
    for heading in ("mean influence", "spread", "standard error"):
        table.add_column(heading, justify="right")
    for index, name in enumerate(scores.tasks):
        spread = np.sqrt(max(square[index] - mean[index] ** 2, 0))
        unknown = facts.subspace is not None and error[index] == 0
        cells = [f"{mean[index]:.4f}", f"{spread:.4f}", "unknown" if unknown else f"{np.sqrt(error[index]):.4f}"]
        table.add_row(name, f"{facts.num_validation[index]:,}", *cells)
    console.print(table)
    for text in facts.warnings:
        warn(text)
