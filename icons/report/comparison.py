"""Optional parts of the report that other commands measured: fine-tuning results, and whether influence predicts.

Results (`--comparison FILE`, as `icons demo` writes it):

    {"tasks": ["shape", ...], "reference": "full",
     "methods": [{"name": "vote", "rows": 800, "runs": [{"seed": 0, "accuracy": {"shape": 0.91, ...}}, ...]}, ...],
     "shares": [{"name": "wrong answers", "pool": 0.25, "selection": 0.11}, ...], "note": "..."}

Validation (`--validation FILE`, as `icons validate` writes it):

    {"columns": ["method", "LDS", ...], "rows": [["exact, Adam", [0.41, 0.33, 0.48], ...], ...],
     "title": "...", "text": "...", "note": "...",
     "counterfactual": {"columns": [...], "rows": [...], "note": "..."}, "tables": [...]}

where `counterfactual` is optional and a table likewise, `tables` are further ones, and three numbers in a list are an
estimate with its interval. A bake-off of rules (`icons validate --rule`) has the same form.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icons.report import figures
from icons.report.accuracies import mean_and_spread, method_results
from icons.report.page import Cell, Fact, Picture, Section, Table
from icons.terminal import counted

_NUM_FACTS = 2
"""Shares in the page's head: those that the selection lowers most."""


def read(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object with at least `keys`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not an object, or a key is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path}: expected an object with {', '.join(keys)}; {', '.join(missing)} missing")
    assert isinstance(content, dict)
    return content


def results(path: Path) -> tuple[Section, list[Fact]]:
    """The section with accuracies per task and method, and the shares for the page's head.

    Raises:
        ValueError: a method lacks a task, or the reference is not among the methods.
    """
    content = read(path, "tasks", "methods", "reference")
    methods = method_results(content, path)
    rows = [
        [
            Cell(method.name),
            Cell("" if method.rows is None else f"{method.rows:,}"),
            *(spread(method.accuracy[task]) for task in content["tasks"]),
            spread(method.relative),
        ]
        for method in methods
    ]
    best = [number for number, method in enumerate(methods) if method.strong]
    table = Table(["method", "rows", *content["tasks"], "Rel. (%)"], rows, content.get("note", ""), best)
    picture = Picture(
        figures.dots([method.name for method in methods], [method.relative for method in methods], 100.0),
        "Rel. (%) of each method: one dot per seed, a bar at the mean, a line at full data.",
        "Rel. (%): one dot per seed, a bar at the mean.",
    )
    text = [
        "Test accuracy (%) after fine-tuning the same start on each set of rows; ± is the deviation over seeds.",
        f"Rel. (%) is the mean over tasks of the accuracy relative to “{content['reference']}”, as in the paper.",
    ]
    section = Section("results", "Results", text, [picture], tables=[table])
    fell = sorted(content.get("shares", []), key=lambda share: share["selection"] - share["pool"])[:_NUM_FACTS]
    facts = [
        Fact(share["name"], f"{100 * share['pool']:.0f} → {100 * share['selection']:.0f} %", "pool → selection")
        for share in fell
    ]
    return section, facts


def validation(path: Path) -> Section:
    """The section on whether influence predicts: a table, and a picture of its first column of intervals.

    Raises:
        ValueError: a row has not as many cells as there are columns.
    """
    content = read(path, "columns", "rows")
    tables = [_measured_table(path, content)]
    if "counterfactual" in content:
        tables.append(_measured_table(path, content["counterfactual"]))
    tables += [_measured_table(path, further) for further in content.get("tables", [])]
    columns, rows = list(content["columns"]), list(content["rows"])
    pictures = []
    for i, column in enumerate(columns):
        if rows and all(isinstance(row[i], list) for row in rows):
            value, low, high = np.array([row[i] for row in rows], dtype=float).T
            picture = figures.intervals([str(row[0]) for row in rows], value, low, high)
            said = f"{column}, with its interval."
            pictures.append(Picture(picture, said, said))
            break
    text = (
        content.get("text")
        or "Models were trained on subsets of the pool; how well do the scores predict their losses?"
    )
    return Section("validation", content.get("title", "Does influence predict?"), [text], pictures, tables=tables)


def _measured_table(path: Path, content: Mapping[str, Any]) -> Table:
    """A table of estimates.

    Raises:
        ValueError: a row has not as many cells as there are columns.
    """
    columns, rows = list(content["columns"]), list(content["rows"])
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{path}: a row of {counted(len(row), 'cell')}; expected {len(columns)}: {row}")
    small = [max((abs(end) for row in rows for end in ends(row[i])), default=1) < 0.1 for i in range(len(columns))]
    cells = [[measured(cell, 3 if small[i] else 2) for i, cell in enumerate(row)] for row in rows]
    return Table(columns, cells, content.get("note", ""))


def ends(cell: object) -> list[float]:
    return cell if isinstance(cell, list) else []


def spread(values: Sequence[float]) -> Cell:
    """Mean over seeds, with the standard deviation where there are several.

    >>> spread([1.0, 3.0])
    Cell(value='2.0', note='± 1.4')
    """
    mean, deviation = mean_and_spread(values)
    return Cell(mean, f"± {deviation}" if deviation else "")


def measured(cell: object, places: int = 2) -> Cell:
    """A table's cell: an estimate with its interval (to so many places), a number, or text.

    >>> measured([0.41, 0.33, 0.48]), measured([0.012, -0.003, 0.027], places=3)
    (Cell(value='0.41', note='0.33 to 0.48'), Cell(value='0.012', note='-0.003 to 0.027'))
    >>> measured(0.7), measured(1234.5)
    (Cell(value='0.700', note=''), Cell(value='1.23e+03', note=''))
    """
    if isinstance(cell, list):
        value, low, high = (f"{number:.{places}f}" for number in cell)
        return Cell(value, f"{low} to {high}")
    if isinstance(cell, float):
        return Cell(f"{cell:.3f}" if abs(cell) < 1 else f"{cell:.3g}")
    return Cell(str(cell))
