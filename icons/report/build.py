"""The report of one selection: reads stores, selection and data, and puts the page's sections in their order."""

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from icons.consensus.selection_file import SavedSelection, SelectionManifest
from icons.datamodules.conversation import ImageRef
from icons.datamodules.dialects import Dialect, images_within
from icons.datamodules.failed_row import FailedRowError
from icons.datamodules.record_lists import source_of
from icons.report import comparison, health, sections
from icons.report.numbers import ScoreNumbers, count
from icons.report.page import Ends, Fact, Page, Section, ShownRow
from icons.report.rows import composition, thumbnail, turns
from icons.store import ScoreStore
from icons.store.failures import failures_of, kinds
from icons.terminal import counted

_MOST_KINDS = 6


@dataclass(frozen=True)
class Chosen:
    """A selection, as the report needs it."""

    selected: Bool[np.ndarray, " rows"]
    manifest: Mapping[str, Any]

    @classmethod
    def of(cls, saved: SavedSelection, scores: ScoreStore) -> "Chosen":
        """A saved selection, checked against the scores it is shown with.

        Raises:
            ValueError: it was made from another number of rows, or for other tasks.
        """
        facts = saved.facts
        num_rows, tasks = facts.num_rows, list(facts.thresholds)
        if num_rows != scores.num_rows or tasks != list(scores.tasks):
            raise ValueError(
                f"selection: was made from {counted(num_rows, 'row')} and the tasks {', '.join(tasks)}; the scores "
                f"{scores.path} have {counted(scores.num_rows, 'row')} and {', '.join(scores.tasks)}; give the store "
                "that it was selected from"
            )
        selected = np.zeros(num_rows, bool)
        selected[saved.rows] = True
        return cls(selected, saved.manifest)

    @cached_property
    def facts(self) -> SelectionManifest:
        return SelectionManifest.read(self.manifest, "selection")

    @property
    def thresholds(self) -> Float[np.ndarray, " tasks"]:
        return np.array(list(self.facts.thresholds.values()), np.float32)


@dataclass(frozen=True)
class Pool:
    """The data file: a row's record (None where it cannot be read) and a record's image."""

    name: str
    record: Callable[[int], Mapping[str, Any] | None]
    image: Callable[[ImageRef], Image.Image]
    """Opens an image as the record names it; raises OSError or ValueError where it cannot."""
    has_images: bool = True
    """False: there is no image folder, and texts are shown alone."""
    dialect: Dialect | None = None
    """How the records are written; None: each as the first dialect that it fits."""


def build(
    scores: ScoreStore,
    chosen: Chosen,
    pool: Pool,
    *,
    title: str = "Selection report",
    source_fields: Sequence[str] = (),
    num_ends: int = 4,
    comparison_file: Path | None = None,
    validation_file: Path | None = None,
) -> Page:
    """Everything on the page, as plain data.

    Args:
        scores: the score store; its row i is record i of the pool.
        chosen: the selection.
        pool: the records and images.
        title: the page's headline.
        source_fields: fields of the records to compare pool and selection by; none: the first folder of the images.
        num_ends: highest and lowest rows shown per task.
        comparison_file: accuracies after fine-tuning, see `icons.report.comparison`.
        validation_file: whether influence predicts, likewise.
    """
    made = chosen.facts
    numbers = count(scores, chosen.thresholds, chosen.selected, num_ends=num_ends)
    share = float(chosen.selected.sum() / max(numbers.num_scored, 1))
    shown: list[Section] = []
    facts: list[Fact] = []
    if comparison_file is not None:
        section, facts = comparison.results(comparison_file)
        shown.append(section)
    shown += filter(None, [health.section(made.health)])
    shown += [
        sections.votes(numbers, made.fraction, made.method),
        sections.scores(numbers),
        *([sections.overlap(numbers, made.fraction)] if len(numbers.tasks) > 1 else []),
        sections.specialists(numbers, share),
    ]
    sampled = len(numbers.sample) if len(numbers.sample) < numbers.num_scored else None
    fields: Sequence[str | None] = source_fields or [None]
    for field in fields:
        parts = composition(numbers.sample, chosen.selected, pool.record, field)
        shown.append(sections.composition(*parts, field, sampled))
    shown.append(sections.border(numbers, made.border.get("verdict", "")))
    shown.append(ends(scores, numbers, chosen, pool, fields[0]))
    if validation_file is not None:
        shown.append(comparison.validation(validation_file))
    shown.append(sections.provenance(chosen.manifest, scores.manifest))
    tasks = counted(len(numbers.tasks), "task")
    return Page(
        title=title,
        subtitle=f"{pool.name} · {scores.num_rows:,} rows · {tasks} · {made.method} at {100 * made.fraction:.4g} %",
        facts=[*_head(scores, numbers, chosen), *facts],
        notices=[*notices(numbers, scores.manifest, chosen.manifest), *_reasons(scores)],
        sections=shown,
        footer=f"Made by icons {importlib.metadata.version('icons-lightning')}. One file; it loads nothing.",
    )


def _head(scores: ScoreStore, numbers: ScoreNumbers, chosen: Chosen) -> Iterator[Fact]:
    """The numbers at the head of the page."""
    failed = scores.num_rows - numbers.num_scored
    yield Fact("rows in the pool", f"{scores.num_rows:,}", f"{failed:,} without a score" if failed else "all scored")
    yield Fact("tasks", str(len(numbers.tasks)))
    num_selected = int(chosen.selected.sum())
    yield Fact(
        "selected", f"{num_selected:,}", f"{100 * num_selected / max(numbers.num_scored, 1):.3g} % of the scored"
    )
    if border := chosen.facts.border:
        certain, may_leave, may_enter = (border[name] for name in ("certain", "may_leave", "may_enter"))
        could = f"{counted(may_leave, 'row')} could swap with {may_enter:,}"
        yield Fact("certain at 95 %", f"{100 * certain / max(num_selected, 1):.1f} %", could)


def notices(numbers: ScoreNumbers, *manifests: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the pictures: failed rows, and warnings that a stage left in a manifest."""
    said = []
    failed = {name: rows for name, rows in numbers.status.items() if name not in ("done", "not written")}
    if failed:
        reasons = ", ".join(f"{rows:,} {name}" for name, rows in failed.items())
        number = sum(failed.values())
        said.append(f"{counted(number, 'row')} failed and cannot be selected: {reasons}.")
    if "not written" in numbers.status:
        said.append(f"The score store is not finished: {numbers.status['not written']:,} rows are missing.")
    for manifest in manifests:
        said += _warnings_in(manifest)
    return list(dict.fromkeys(said))


def _reasons(scores: ScoreStore) -> Iterator[str]:
    """Why rows failed, by kind, the most frequent first, with the first row of each kind."""
    for kind in kinds(failures_of(scores))[:_MOST_KINDS]:
        yield f"{kind.count:,} × {kind.status.name.lower().replace('_', ' ')}, for example {kind.examples[0]}"


def _warnings_in(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Texts under `warning` or `warnings`, at any depth.

    >>> list(_warnings_in({"settings": {"warning": "the warm-up hardly moved"}, "warnings": ["a", "b"]}))
    ['the warm-up hardly moved', 'a', 'b']
    """
    for key, value in manifest.items():
        if isinstance(value, Mapping):
            yield from _warnings_in(value)
        elif key in ("warning", "warnings") and value:
            yield from [value] if isinstance(value, str) else map(str, value)


def ends(scores: ScoreStore, numbers: ScoreNumbers, chosen: Chosen, pool: Pool, field: str | None) -> Section:
    """The highest and lowest rows of each task, with text and image."""

    def show(row: int, task: int | None) -> ShownRow:
        return _shown_row(scores, numbers, chosen, pool, row, task, field)

    consensus = Ends(
        "consensus",
        "by votes, then by mean score",
        [show(row, None) for row in numbers.best.tolist()],
        [show(row, None) for row in numbers.rejected.tolist()],
        titles=("the best of the selected", "the last of the rejected"),
    )
    by_task = [
        Ends(
            name,
            f"threshold {numbers.thresholds[task]:.4g}",
            [show(row, task) for row in numbers.highest[task].tolist() if row >= 0],
            [show(row, task) for row in numbers.lowest[task].tolist() if row >= 0],
        )
        for task, name in enumerate(numbers.tasks)
    ]
    text = [
        "What all tasks together ask for and reject, then the rows with the highest and the lowest influence on each "
        "task: what the task asks for, and what works against it."
    ]
    return Section("rows", "Highest and lowest rows", text, ends=[consensus, *by_task])


def _shown_row(
    scores: ScoreStore, numbers: ScoreNumbers, chosen: Chosen, pool: Pool, row: int, task: int | None, field: str | None
) -> ShownRow:
    """A row with its score on `task`, or with its mean score over the tasks where that is None."""
    record = pool.record(row)
    image, problem = "", "" if record is not None else "this record cannot be read"
    images = [] if record is None else images_in(record, pool.dialect)
    if images and (pool.has_images or images[0].content is not None):
        try:
            with closing(pool.image(images[0])) as picture:
                image = thumbnail(picture)
        except FileNotFoundError:
            problem = f"image {images[0].name} is not in the image folder"
        # whatever a broken file makes the decoder raise, the page says so and goes on
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            problem = f"image {images[0].name} cannot be decoded"
    influence, errors = (np.asarray(array[row]) for array in (scores.influence, scores.stderr))
    score, stderr = (influence.mean(), 0.0) if task is None else (influence[task], errors[task])
    return ShownRow(
        row=row,
        id=str((record or {}).get("id", "")),
        source="" if record is None else source_of(record, field),
        score=f"{score:.4g}",
        stderr=f"{stderr:.2g}" if stderr > 0 else "",
        votes=int(numbers.row_votes[row]),
        selected=bool(chosen.selected[row]),
        turns=turns(record or {}, pool.dialect),
        image=image,
        problem=problem,
    )


def images_in(record: Mapping[str, Any], dialect: Dialect | None = None) -> list[ImageRef]:
    """A record's images; none where they are not written as images are."""
    try:
        return images_within(record, dialect)
    except FailedRowError:
        return []
