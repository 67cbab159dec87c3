"""RunEstimate: what a run would do, worked out without loading a weight or writing a byte (`--dry-run`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


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
        work["time, about"] = f"{_duration(self.seconds)} ({self.speed})"
        console.print(table("work", work))
        console.print("dry run: nothing was written")


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


def _duration(seconds: float | int) -> str:
    """
    >>> _duration(45), _duration(600), _duration(20_000)
    ('45 s', '10 min', '5.6 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
