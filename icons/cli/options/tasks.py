"""Options of `icons tasks`."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class TasksOptions:
    """Makes a task's validation file from a benchmark's own published files.

    $ icons tasks list
    $ icons tasks build gqa --source gqa/ --out tasks/

    `icons tasks list` says for each benchmark what to download, from where, and what it becomes; `icons tasks build
    NAME --source DIR --out DIR` writes `NAME.json` (LLaVA JSON), its images in `NAME/`, and `NAME.manifest.json`.
    """

    positional: ClassVar = ("action", "name")
    action: Literal["build", "list"]
    """`build` or `list`"""
    name: str | None = None
    """the benchmark, as `icons tasks list` names it; with `list`, show this one alone"""
    source: str | None = None
    """the folder with the benchmark's files, laid out as they are when unpacked"""
    out: str | None = None
    """the folder to write to"""
    num_rows: int = 500
    """size of the seeded sample (a group of subtasks shares it); 0 takes every question"""
    split: str | None = None
    """part of the benchmark; default: one that the evaluation does not score, where there is one"""
    seed: int = 0
    """seed of the sample"""
    overwrite: bool = False
    """write to --out even if it holds something that was not built by this command, or was edited since"""
