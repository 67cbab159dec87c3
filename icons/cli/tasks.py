"""`icons tasks build NAME` and `icons tasks list`: validation files from the benchmarks' own published files."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from icons.cli.console import results, say
from icons.cli.options.tasks import TasksOptions
from icons.datamodules.benchmarks import BENCHMARKS, build
from icons.terminal import counted


def tasks(options: TasksOptions) -> int:
    """Makes a task's validation file from a benchmark's own published files."""
    if options.name is not None and options.name not in BENCHMARKS:
        raise ValueError(f"no benchmark {options.name!r}; known: {', '.join(BENCHMARKS)}")
    if options.action == "list":
        show([options.name] if options.name else list(BENCHMARKS))
        return 0
    if options.name is None or options.source is None or options.out is None:
        raise ValueError("build takes the benchmark's name, --source DIR and --out DIR; see `icons tasks list`")
    benchmark = BENCHMARKS[options.name]
    if not Path(options.source).is_dir():
        raise FileNotFoundError(
            f"--source {options.source}: no such folder; `icons tasks list {options.name}` says what to download"
        )
    built = build(
        benchmark,
        Path(options.source),
        Path(options.out),
        num_rows=options.num_rows or None,
        split=options.split,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    table = Table("task", "rows", "of", "data", "images")
    for task in built:
        table.add_row(task.name, str(task.num_rows), str(task.num_questions), str(task.path), str(task.images))
    results.print(table)
    for reason, count in built[0].left_out.items():
        say(f"left out: {counted(count, 'question')}: {reason}")
    if (options.split or benchmark.splits[0]) in benchmark.evaluated:
        say("These questions are among those that LLaVA's evaluation scores: leave the ids in the manifest out of it.")
    if benchmark.subtasks:
        names = ",".join(task.name for task in built)
        say(f"One task of {len(built)} subtasks; give `icons influence` each of them, and")
        say(f"--group {options.name}={names}")
    return 0


def show(names: list[str]) -> None:
    """Prints what to download for each benchmark, from where, and what it becomes."""
    for name in names:
        benchmark = BENCHMARKS[name]
        scored = f" (scored by LLaVA's evaluation: {', '.join(benchmark.evaluated)})" if benchmark.evaluated else ""
        results.print(f"[bold]{name}[/bold]  {escape(benchmark.title)}")
        say(f"  becomes   {benchmark.becomes}")
        say(f"  splits    {', '.join(benchmark.splits)}{scored}")
        for path, url in benchmark.downloads:
            say(f"  needs     {path}  {url}")
