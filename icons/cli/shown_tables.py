"""The tables of `icons validate` on the terminal, from the content of their JSON files."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from icons.cli.console import console


def show(content: Mapping[str, Any]) -> None:
    for part in (content, *([content["counterfactual"]] if "counterfactual" in content else content.get("tables", []))):
        shown = Table(*part["columns"])
        for row in part["rows"]:
            shown.add_row(*(said(cell) for cell in row))
        console.print(shown)
    console.print(content["text"], content.get("counterfactual", {}).get("note", ""), soft_wrap=True)


def said(cell: Any) -> str:
    """A cell of the table.

    >>> said([0.5, 0.25, 0.75]), said(0.31), said("ours")
    ('0.5 (0.25 to 0.75)', '0.31', 'ours')
    """
    return "{:.3g} ({:.3g} to {:.3g})".format(*cell) if isinstance(cell, list) else str(cell)
