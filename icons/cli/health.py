"""The health of a selection as `icons select` and `icons report` say it: measured from stores and records."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from icons.cli.console import console, tell, warn
from icons.cli.loaded_scores import LoadedScores
from icons.consensus import Selection
from icons.consensus.composition import Kind, composition
from icons.consensus.health import WHAT_TO_DO, Health
from icons.consensus.random_sets import Compared
from icons.datamodules.dialects import Dialect
from icons.datamodules.records import RecordSource, open_records
from icons.datamodules.traits import read_traits
from icons.scores import Scorer
from icons.store.manifest import ScoreManifest

_MOST_RECORDS, _MOST_OF_TASK = 50_000, 2_000
"""Records read for the composition: of the pool, and of each task."""
MOST_KINDS = 5


def measure(
    chosen: Selection,
    known: LoadedScores,
    records: RecordSource,
    source_field: str | None,
    dialect: Dialect | None,
    seed: int,
) -> Health:
    """The measures of a selection, of a large pool by a seeded sample; what cannot be measured is a note."""
    generator, notes = np.random.default_rng(seed), list[str]()
    rows = np.sort(generator.permutation(len(chosen.votes))[:_MOST_RECORDS])
    selected = np.isin(rows, chosen.rows)
    asked = _asked_by(known, source_field, generator, notes)
    kinds = composition(read_traits(records, rows.tolist(), source_field, dialect), selected, asked)
    gradients: Scorer | None = None
    try:
        gradients = known.scorer(True)
    except (ValueError, OSError) as error:
        notes.append(f"hurt validation rows and redundancy are not measured: {error}")
    scored = np.isfinite(chosen.percentile_rank)
    return Health.of(chosen.rows, scored, gradients, known.facts.groups, known.kept, kinds, notes, seed)


def _asked_by(
    known: LoadedScores, source_field: str | None, generator: np.random.Generator, notes: list[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Task -> the traits of its validation rows, by a sample where they are many."""
    asked = {}
    for task in known.tasks:
        files = _task_files(known.facts, task)
        try:
            parts = [_task_traits(file, source_field, generator) for file in files]
        except (OSError, ValueError) as error:
            notes.append(f"what {task} asks is not known: {error}")
            continue
        if parts:
            asked[task] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        else:
            notes.append(f"what {task} asks is not known: the score store does not name its data file")
    return asked


def _task_files(facts: ScoreManifest, task: str) -> list[Path]:
    """The data files of a task's validation rows, as the manifest names them."""
    files: list[Path] = []
    for member in facts.members(task):
        entry = facts.tasks.get(member)
        entry = entry[0] if isinstance(entry, list) and entry else entry
        data = entry.get("data") if isinstance(entry, Mapping) else None
        path = data.get("path") if isinstance(data, Mapping) else None
        files += [Path(path)] if path else []
    return files


def _task_traits(file: Path, source_field: str | None, generator: np.random.Generator) -> Mapping[str, np.ndarray]:
    records = open_records(file)
    rows = np.sort(generator.permutation(len(records))[:_MOST_OF_TASK])
    return read_traits(records, rows.tolist(), source_field)


def show(health: Health) -> None:
    """Prints the measures, then the warnings with what to do."""
    if health.hurt:
        table = Table("validation rows hurt by", "this selection", "random sets of its size")
        for task, part in health.hurt.items():
            table.add_row(escape(task), f"{100 * part.value:.0f} %", said(part))
        console.print(table)
    if health.effective is not None:
        shown = f"{health.effective.low:.0f} to {health.effective.high:.0f}"
        worth = f"redundancy: 1,000 of its rows are worth {health.effective.value:.0f} different ones"
        console.print(f"{worth} (random sets: {shown})", soft_wrap=True)
    for line in _differing(health.kinds):
        tell(line)
    for note in health.notes:
        tell(f"note: {note}")
    warnings = health.warnings()
    for text in warnings:
        warn(text)
    if warnings:
        console.print(escape(WHAT_TO_DO), soft_wrap=True)


def said(part: Compared) -> str:
    """
    >>> said(Compared(0.5, 0.25, 0.2, 0.3))
    '25 % (20 to 30 %)'
    """
    return f"{100 * part.mean:.0f} % ({100 * part.low:.0f} to {100 * part.high:.0f} %)"


def _differing(kinds: Sequence[Kind]) -> list[str]:
    """The kinds that differ most from the pool, a line each; only those that a random draw would hardly give."""
    lines = []
    for kind in [kind for kind in kinds if abs(kind.deviation) > 4][:MOST_KINDS]:
        asked = "" if kind.tasks is None else f", {100 * kind.tasks:.1f} % of the tasks' rows"
        change = "more" if kind.selected > kind.pool else "less"
        lines.append(
            f"{change} of {kind.trait} “{kind.value}”: {100 * kind.selected:.1f} % of the selection, "
            f"{100 * kind.pool:.1f} % of the pool{asked}"
        )
    return lines
