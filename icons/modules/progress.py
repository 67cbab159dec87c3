"""How far a run is: rows of a prediction, steps of a fit; a bar in a terminal, a line a minute in a log."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressLines:
    """A line a minute on standard error with count, rate and time left: what a job's log can show in place of a bar.

    Args:
        unit: what is counted.
        total: how many there are; 0 where nobody knows.
        every_s: seconds between lines.
        clock: seconds that only grow.
    """

    def __init__(
        self, unit: str, total: int, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.unit, self.total, self.every_s, self.clock = unit, total, every_s, clock
        self.done, self.started = 0, clock()
        self.said = self.started

    def advance(self, count: int, note: str = "") -> None:
        """Counts, and prints a line when the last one is a minute old."""
        self.done += count
        if self.clock() - self.said >= self.every_s:
            self.print(note)

    def print(self, note: str = "") -> None:
        self.said = self.clock()
        spent = max(self.said - self.started, 1e-9)
        rate = self.done / spent
        of = f"/{self.total:,}" if self.total else ""
        line = f"{self.done:,}{of} {self.unit}, {rate:,.3g} a second, {timedelta(seconds=round(spent))} so far"
        if self.total and rate:
            line += f", {timedelta(seconds=round((self.total - self.done) / rate))} left"
        print(line + (f", {note}" if note else ""), file=sys.stderr, flush=True)


class FitProgress(Callback):
    """A fit's steps and loss, a line a minute; for where there is no terminal."""

    def __init__(self) -> None:
        self.lines: ProgressLines | None = None
        self.first = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.first = trainer.global_step
            self.lines = ProgressLines("steps", max(0, int(trainer.estimated_stepping_batches) - self.first))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.lines is not None:
            loss = trainer.callback_metrics.get("loss")
            done = trainer.global_step - self.lines.done - self.first
            self.lines.advance(done, "" if loss is None else f"loss {float(loss):.4g}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.lines is not None:
            self.lines.print()


class RowProgress:
    """The rows of the first rank, on standard error; only where the Trainer would show a bar of Lightning's own.

    A bar in a terminal, elsewhere a line a minute.

    Lightning counts batches, of which nobody knows the number: it follows from the length of every row, and to measure
    millions of rows before the first is computed would take longer than it is worth. Rows are known at once.

    Args:
        trainer: its bar is switched off from now on until `stop`.
    """

    def __init__(self, trainer: Trainer) -> None:
        bar = trainer.progress_bar_callback if trainer.is_global_zero else None
        self.replaced = bar if isinstance(bar, (RichProgressBar, TQDMProgressBar)) and bar.is_enabled else None
        self.unit = f"rows of rank 0 of {trainer.world_size}" if trainer.world_size > 1 else "rows"
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self.as_lines = self.replaced is not None and not console.is_terminal
        self.bar = Progress(
            TextColumn(self.unit), *columns, console=console, disable=not self.replaced or self.as_lines
        )
        self.task: TaskID | None = None
        self.lines: ProgressLines | None = None
        if self.replaced is not None:
            self.replaced.disable()

    def start(self, total: int) -> None:
        self.task = self.bar.add_task(self.unit, total=total)
        self.bar.start()
        self.lines = ProgressLines(self.unit, total) if self.as_lines else None

    def advance(self, rows: int) -> None:
        if self.task is not None:
            self.bar.advance(self.task, rows)
        if self.lines is not None:
            self.lines.advance(rows)

    def stop(self) -> None:
        """Leaves the bar as it stands, and gives Lightning its own back; may be called again."""
        self.bar.stop()
        if self.lines is not None:
            self.lines.print()
            self.lines = None
        if self.replaced is not None:
            self.replaced.enable()
            self.replaced = None
