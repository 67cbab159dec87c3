"""`icons compare A B`: what two selections, or a selection and a published list, have in common."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from icons.cli.console import console
from icons.cli.options.compare import CompareOptions
from icons.consensus import matrix_of
from icons.consensus.overlap import Overlap, overlap, task_overlap
from icons.consensus.selection_file import manifest_path, open_selection
from icons.datamodules.record_lists import entries_of
from icons.output import check_output, put, read_object
from icons.store import ScoreStore

MADE_BY = "icons compare"


def compare(options: CompareOptions) -> int:
    """Prints the overlap of two selections, and of the tasks that voted for them."""
    if options.out is not None:
        sides = [path for side in (options.a, options.b) for path in (side, manifest_path(side))]
        inputs = {"A or B": sides, "--scores": options.scores}
        check_output(options.out, kind="file", inputs=inputs, ours=_is_comparison, overwrite=options.overwrite)
    one, other = _Listed.open(options.a), _Listed.open(options.b)
    key = options.by if options.by != "auto" else ("row" if one.same_rows(other) else "id")
    common = overlap(one.entries(key), other.entries(key))
    pool = one.num_rows or other.num_rows
    show(common, one, other, key, pool)
    numbers: dict[str, Any] = {
        "made_by": MADE_BY,
        "a": str(options.a), "b": str(options.b), "by": key,
        "num_a": common.num_a, "num_b": common.num_b, "shared": common.shared,
        "share_of_a": common.share_of_a, "share_of_b": common.share_of_b, "jaccard": common.jaccard,
        "shared_by_chance": common.by_chance(pool) if pool else None,
    }  # fmt: skip
    scores = options.scores or one.scores_path
    if scores is not None and (options.scores is not None or Path(scores).is_dir()):
        store = ScoreStore.open(scores)
        share = options.fraction if options.fraction is not None else float(one.manifest.get("fraction", 0.2))
        matrix, tasks = matrix_of(store)
        shared = task_overlap(matrix, share)
        _show_tasks(tasks, shared, share)
        numbers["tasks"] = {"names": tasks, "fraction": share, "overlap": shared.tolist()}
    if options.out is not None:
        put(options.out, json.dumps(numbers, indent=2) + "\n")
    return 0


def _is_comparison(path: Path) -> bool:
    return read_object(path).get("made_by") == MADE_BY


@dataclass(frozen=True)
class _Listed:
    """One side of a comparison: rows from a selection's manifest, or the entries of a list."""

    path: Path
    rows: list[int] | None
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "_Listed":
        if manifest_path(path).exists():
            saved = open_selection(path)
            return cls(path, saved.rows.tolist(), saved.manifest)
        entries = entries_of(path)
        if not entries:
            raise ValueError(
                f"{path}: is empty; expected a selection, row numbers (.txt), or ids or records (.json, .jsonl)"
            )
        rows = [entry for entry in entries if isinstance(entry, int)]
        return cls(path, rows if len(rows) == len(entries) else None, {})

    @property
    def num_rows(self) -> int | None:
        """Rows of the pool, where a manifest tells."""
        return self.manifest.get("num_rows")

    @property
    def scores_path(self) -> str | None:
        return self.manifest.get("scores", {}).get("path")

    def same_rows(self, other: "_Listed") -> bool:
        """Whether row numbers mean the same records on both sides."""
        if self.rows is None or other.rows is None:
            return False
        data = [side.manifest.get("data", {}).get("fingerprint") for side in (self, other)]
        return None in data or data[0] == data[1]

    def entries(self, key: str) -> list[int] | list[str]:
        """Row numbers, or ids.

        Raises:
            ValueError: this side has none.
        """
        if key == "row":
            if self.rows is None:
                raise ValueError(f"{self.path}: holds ids, no row numbers; compare with --by id")
            return self.rows
        if self.path.suffix == ".txt":
            raise ValueError(f"{self.path}: holds row numbers, no ids; compare with --by row")
        ids = [entry for entry in entries_of(self.path) if isinstance(entry, str)]
        if not ids:
            raise ValueError(f"{self.path}: holds no ids; compare with --by row")
        return ids


def show(common: Overlap, a: _Listed, b: _Listed, key: str, pool: int | None) -> None:
    table = Table("", key + "s", "shared", "share", title=f"overlap by {key}")
    table.add_row(a.path.name, f"{common.num_a:,}", f"{common.shared:,}", f"{100 * common.share_of_a:.1f} %")
    table.add_row(b.path.name, f"{common.num_b:,}", f"{common.shared:,}", f"{100 * common.share_of_b:.1f} %")
    console.print(table)
    chance = f"; chance would share {common.by_chance(pool):,.0f}" if pool else ""
    console.print(f"Jaccard {common.jaccard:.3f}{chance}")


def _show_tasks(tasks: list[str], shared: np.ndarray, fraction: float) -> None:
    title = f"of a task's top {100 * fraction:.3g} %, the share (%) in another's; chance {100 * fraction:.3g}"
    table = Table("task", *tasks, title=title)
    for name, row in zip(tasks, shared, strict=True):
        table.add_row(name, *(f"{100 * share:.1f}" for share in row))
    console.print(table)
