"""Options of `icons compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Prints the overlap of two selections, and of the tasks that voted for them.

    $ icons compare selected.json LLAVA-ICONS-133K.json
    """

    positional: ClassVar = ("a", "b")
    a: Path
    """a selection made by `icons select`, or a list: row numbers (.txt), or ids or records with ids (.json, .jsonl)
    such as LLAVA-ICONS-133K"""
    b: Path
    """the selection or list to compare it with"""
    by: Literal["auto", "row", "id"] = "auto"
    """compare row numbers or ids; auto: rows if both know theirs and come from the same data, otherwise ids"""
    scores: str | None = None
    """score store for the overlap of tasks; default: the one A was selected from, if it is still there"""
    fraction: float | None = None
    """share of the rows that each task votes for in the overlap of tasks; default: A's, or 0.2"""
    out: Path | None = None
    """also write the numbers as JSON"""
    overwrite: bool = False
    """write --out even if it holds something other than an earlier comparison"""
