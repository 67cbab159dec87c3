"""RowProgress: how far predict is, in rows, in place of Lightning's bar of batches."""

from lightning import Trainer
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


class RowProgress:
    """A bar of the rows of the first rank, on standard error; only where the Trainer would show one of Lightning's own.

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
        self.bar = Progress(TextColumn(self.unit), *columns, console=Console(stderr=True), disable=not self.replaced)
        self.task: TaskID | None = None
        if self.replaced is not None:
            self.replaced.disable()

    def start(self, total: int) -> None:
        self.task = self.bar.add_task(self.unit, total=total)
        self.bar.start()

    def advance(self, rows: int) -> None:
        if self.task is not None:
            self.bar.advance(self.task, rows)

    def stop(self) -> None:
        """Leaves the bar as it stands, and gives Lightning its own back; may be called again."""
        self.bar.stop()
        if self.replaced is not None:
            self.replaced.enable()
            self.replaced = None
