"""`icons tasks build NAME` and `icons tasks list`: validation files from the benchmarks' own published files."""

from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icons.datamodules.benchmarks import BENCHMARKS, build

POSITIONAL = ("action", "name")


def tasks(
    action: Literal["build", "list"],
    name: str | None = None,
    source: str | None = None,
    out: str | None = None,
    num_rows: int = 500,
    split: str | None = None,
    seed: int = 0,
) -> int | None:
    """Makes a task's validation file from a benchmark's own published files.

    `icons tasks list` says for each benchmark what to download, from where, and what it becomes; `icons tasks build
    NAME --source DIR --out DIR` writes `NAME.json` (LLaVA JSON), its images in `NAME/`, and `NAME.manifest.json`.

    Args:
        action: `build` or `list`.
        name: the benchmark, as `icons tasks list` names it; with `list`, show this one alone.
        source: the folder with the benchmark's files, laid out as they unpack.
        out: the folder to write to.
        num_rows: size of the seeded sample (a group of subtasks shares it); 0 takes every question.
        split: part of the benchmark; by default one that the evaluation does not score, where there is one.
        seed: of the sample.
    """
    if name is not None and name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    console = Console()
    if action == "list":
        show(console, [name] if name else list(BENCHMARKS))
        return None
    if name is None or source is None or out is None:
        raise ValueError("build takes the benchmark's name, --source DIR and --out DIR; see `icons tasks list`")
    benchmark = BENCHMARKS[name]
    if not Path(source).is_dir():
        raise FileNotFoundError(f"--source {source}: no such folder; `icons tasks list {name}` says what to download")
    built = build(benchmark, Path(source), Path(out), num_rows=num_rows or None, split=split, seed=seed)
    table = Table("task", "rows", "of", "data", "images")
    for task in built:
        table.add_row(task.name, str(task.num_rows), str(task.num_questions), str(task.path), str(task.images))
    console.print(table)
    if (split or benchmark.splits[0]) in benchmark.evaluated:
        console.print(
            "These questions are among those that LLaVA's evaluation scores: leave the ids in the manifest out of it."
        )
    if benchmark.subtasks:
        names = ",".join(task.name for task in built)
        group = f"--group {name}={names}"
        console.print(f"One task of {len(built)} subtasks; give `icons influence` each of them, and", soft_wrap=True)
        console.print(group, soft_wrap=True)
    return None


def show(console: Console, names: list[str]) -> None:
    """Prints what to download for each benchmark, from where, and what it becomes."""
    for name in names:
        benchmark = BENCHMARKS[name]
        scored = f" (scored by LLaVA's evaluation: {', '.join(benchmark.evaluated)})" if benchmark.evaluated else ""
        console.print(f"[bold]{name}[/bold]  {escape(benchmark.title)}")
        console.print(f"  becomes   {escape(benchmark.becomes)}", soft_wrap=True)
        console.print(f"  splits    {', '.join(benchmark.splits)}{scored}", soft_wrap=True)
        for path, url in benchmark.downloads:
            console.print(f"  needs     {escape(path)}  {escape(url)}", soft_wrap=True)
