"""The section on a selection's health: what the scores themselves say of it, as the selection stage measured it."""

from collections.abc import Mapping
from typing import Any

from icons.consensus.composition import Kind
from icons.consensus.health import WHAT_TO_DO, Health
from icons.report.page import Cell, Section, Table

MOST_KINDS = 12


def section(content: Mapping[str, Any] | None) -> Section | None:
    """From what a selection's manifest says of it; None where nothing was measured."""
    if content is None:
        return None
    health = Health.from_plain(content)
    text = [
        "The selection beside random sets of its size. A validation row is hurt when the influences of all selected "
        "rows on it add up to less than nothing."
    ]
    if health.effective is not None:
        part = health.effective
        text.append(
            f"Redundancy: 1,000 of its rows are worth {part.value:.0f} different ones; of random rows "
            f"{part.mean:.0f} ({part.low:.0f} to {part.high:.0f})."
        )
    text += [*health.notes, *([WHAT_TO_DO] if health.warnings() else [])]
    tables = []
    if health.hurt:
        rows = [
            [Cell(task), Cell(f"{100 * part.value:.0f} %"), Cell(f"{100 * part.mean:.0f} %", ends(part.low, part.high))]
            for task, part in health.hurt.items()
        ]
        tables.append(Table(["validation rows hurt by", "this selection", "random sets"], rows))
    if health.kinds:
        kinds = [_row_of(kind) for kind in health.kinds[:MOST_KINDS]]
        columns = ["rows that differ most", "selection", "pool", "tasks' validation rows"]
        tables.append(Table(columns, kinds, "Shares of records of a kind, those first whose share differs most."))
    return Section("health", "Health of the selection", text, tables=tables)


def ends(low: float, high: float) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def _row_of(kind: Kind) -> list[Cell]:
    """
    >>> [cell.value for cell in _row_of(Kind("answer", "yes", 0.48, 0.2, None, 9.0))]
    ['answer: yes', '48.0 %', '20.0 %', '']
    """
    asked = "" if kind.tasks is None else f"{100 * kind.tasks:.1f} %"
    return [
        Cell(f"{kind.trait}: {kind.value}"), Cell(f"{100 * kind.selected:.1f} %"), Cell(f"{100 * kind.pool:.1f} %"),
        Cell(asked),
    ]  # fmt: skip
