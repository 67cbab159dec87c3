"""What the demo found: the paper's table, the shares by provenance, and the votes, as one JSON object and as tables."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.box import SIMPLE
from rich.table import Table

from icons.report.accuracies import mean_and_spread, method_results

REFERENCE = "full"
Runs = Mapping[str, Sequence[Mapping[str, float]]]


def outcome(
    records: Sequence[Mapping[str, Any]],
    rows: Int[np.ndarray, " selected"],
    votes: Int[np.ndarray, " pool"],
    runs: Runs,
    note: str = "",
) -> dict[str, Any]:
    """The demo's findings, in the form that `icons report --comparison` reads.

    Args:
        records: the pool, with `provenance`.
        rows: the selection.
        votes: of every row of the pool.
        runs: subset's name (`selected`, `vote`, `random`, `full`) -> one mapping per run, task -> test accuracy.
        note: stands under the table.
    """
    provenance = np.array([record["provenance"] for record in records])
    sizes = {name: len(records) if name == REFERENCE else len(rows) for name in runs}
    return {
        "tasks": list(runs[REFERENCE][0]),
        "reference": REFERENCE,
        "methods": [
            {
                "name": name,
                "rows": sizes[name],
                "strong": name == "selected",
                "runs": [{"seed": seed, "accuracy": dict(run)} for seed, run in enumerate(several)],
            }
            for name, several in runs.items()
        ],
        "shares": [
            {
                "name": name,
                "pool": float((provenance == name).mean()),
                "selection": float((provenance[rows] == name).mean()) if len(rows) else 0.0,
            }
            for name in Counter(provenance.tolist())
        ],
        "votes": np.bincount(votes).tolist(),
        "note": note,
    }


def comparison_table(content: Mapping[str, Any]) -> Table:
    """Test accuracy (%) per task and subset, and Rel. (%): its mean over tasks, relative to full data."""
    table = Table(
        title="Test accuracy (%) after fine-tuning the same start", caption=content["note"] or None, box=SIMPLE
    )
    table.add_column("trained on")
    for heading in ("rows", *content["tasks"], "Rel. (%)"):
        table.add_column(heading, justify="right")
    for method in method_results(content, "comparison"):
        several = len(method.relative)
        name = method.name + (f" ×{several}" if several > 1 else "")
        cells = [spread(values) for values in (*method.accuracy.values(), method.relative)]
        table.add_row(name, f"{method.rows:,}", *cells, style="bold" if method.strong else None)
    return table


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there are several.

    >>> spread([1.0, 3.0]), spread([2.0])
    ('2.0 ±1.4', '2.0')
    """
    return " ±".join(part for part in mean_and_spread(values) if part)


def shares_table(content: Mapping[str, Any]) -> Table:
    """What pool and selection are made of."""
    table = Table("provenance", title="What was selected (never read by the method)", box=SIMPLE)
    table.add_column("share of the pool", justify="right")
    table.add_column("share of the selection", justify="right")
    for share in sorted(content["shares"], key=lambda share: -share["pool"]):
        table.add_row(share["name"], f"{share['pool']:.1%}", f"{share['selection']:.1%}")
    return table


def votes_table(content: Mapping[str, Any], width: int = 40) -> Table:
    """The histogram of votes in the pool."""
    table = Table("votes", title="Votes in the pool", box=SIMPLE)
    table.add_column("rows", justify="right")
    table.add_column("")
    for number, rows in enumerate(content["votes"]):
        table.add_row(str(number), f"{rows:,}", "█" * round(width * rows / max(content["votes"])))
    return table
