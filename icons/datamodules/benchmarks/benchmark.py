"""A benchmark's published files, and the task file made of them: layout, seeded sample, provenance."""

import csv
import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from icons.datamodules.benchmarks.pictures import Image, PictureFolder
from icons.folder_lock import in_turn
from icons.output import check_output, is_marked, mark, put, read_object

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One question of a benchmark, in the words that LLaVA's evaluation asks it with."""

    id: str
    image: Image
    image_name: str
    """Its path inside the task's image folder, unique in the benchmark."""
    prompt: str
    answer: str
    subtask: str = ""
    """Set where the benchmark is a group of tasks (MME): one file is written per subtask."""


@dataclass(frozen=True)
class LeftOut:
    """A question that cannot be asked, and why: it is counted."""

    reason: str


Reader = Callable[[Path, str], Iterator[Example | LeftOut]]
_COMMAND = "tasks build"
# what a reader runs into in a file of another form than it knows
_OTHER_FORM = (
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
    OverflowError,
    RecursionError,
    csv.Error,
)


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is published, and how its questions are read."""

    name: str
    title: str
    downloads: tuple[tuple[str, str], ...]
    """(path below the source folder, where it is published), in the order of need."""
    becomes: str
    """What a record's prompt and answer look like."""
    splits: tuple[str, ...]
    """Parts with public answers, the default first."""
    evaluated: tuple[str, ...]
    """Those of `splits` that LLaVA's evaluation scores: a sample of them must be left out of the final evaluation."""
    read: Reader
    subtasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuiltTask:
    """One written task file."""

    name: str
    path: Path
    images: Path
    num_rows: int
    """Rows written."""
    num_questions: int
    """Questions that the sample was drawn from."""
    left_out: dict[str, int]
    """Reason -> questions of the benchmark that cannot be asked."""


def build(
    benchmark: Benchmark,
    source: Path,
    out: Path,
    *,
    num_rows: int | None,
    split: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> list[BuiltTask]:
    """Writes `out/NAME.json` (LLaVA JSON), its images below `out/NAME/`, and `out/NAME.manifest.json`.

    The sample depends on the benchmark's files, `split`, `num_rows` and `seed` alone, keeps the benchmark's order, and
    takes every question where there are no more than `num_rows`. A benchmark with subtasks becomes one file per
    subtask, `NAME_SUBTASK.json`, each with `num_rows` divided by their number, rounded up.

    Args:
        num_rows: size of the sample; None takes every question.
        split: one of `benchmark.splits`; None takes the first.
        overwrite: write also where something lies that was not built before.

    Returns:
        One entry per written task file, in the order of the benchmark's subtasks.

    Raises:
        ValueError: unknown split, `num_rows` below 1, no question in the files, files of another form, or something
            of the user's lies where they would be written.
        FileNotFoundError: a file of the benchmark's layout is missing; says where it is published.
    """
    split = benchmark.splits[0] if split is None else split
    if split not in benchmark.splits:
        raise ValueError(f"{benchmark.name}: no split {split!r} with public answers; has {', '.join(benchmark.splits)}")
    if num_rows is not None and num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}")
    names = ["_".join(filter(None, [benchmark.name, subtask])) for subtask in benchmark.subtasks or ("",)]
    _check_outputs(benchmark, names, source, out, overwrite)
    try:
        parts = list(benchmark.read(source, split))
    except FileNotFoundError as error:
        wanted = "; ".join(f"{path} from {url}" for path, url in benchmark.downloads)
        raise FileNotFoundError(f"{benchmark.name}: {error}. The layout is: {wanted}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{benchmark.name}: a file in {source} is not UTF-8 ({error.reason}); convert it") from error
    except KeyError as error:
        raise ValueError(f"{benchmark.name}: no {error} in {source}'s files; is it another version of them?") from error
    except _OTHER_FORM as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{benchmark.name}: the files in {source} are of another form than known ({what}); is it another version?"
        ) from error
    except ValueError as error:
        raise ValueError(f"{benchmark.name}: {error}") from error
    examples = [one for one in parts if isinstance(one, Example)]
    left_out = Counter(one.reason for one in parts if isinstance(one, LeftOut))
    log.debug("%s: %d questions in %s, %d left out", benchmark.name, len(examples), source, left_out.total())
    mark(out / benchmark.name, _COMMAND)
    groups = {name: [one for one in examples if one.subtask == name] for name in benchmark.subtasks or ("",)}
    share = None if num_rows is None else -(-num_rows // len(groups))
    return [
        _write_task(benchmark, subtask, group, share, out, source=source, split=split, seed=seed, left_out=left_out)
        for subtask, group in groups.items()
    ]


def _check_outputs(benchmark: Benchmark, names: Sequence[str], source: Path, out: Path, overwrite: bool) -> None:
    """Refuses to write over anything but a task that was built before, with not a byte changed since."""
    common: dict[str, Any] = {"inputs": {}, "searched": {"--source": source}, "overwrite": overwrite}
    for name in names:
        manifest = out / f"{name}.manifest.json"
        kept = read_object(manifest)
        check_output(manifest, kind="file", ours=lambda _: kept.get("benchmark") == benchmark.name, **common)  # noqa: B023
        check_output(out / f"{name}.json", kind="file", ours=partial(_is_as_built, kept=kept), **common)
    check_output(out / benchmark.name, kind="folder", ours=partial(is_marked, command=_COMMAND), **common)


def _is_as_built(path: Path, kept: dict[str, object]) -> bool:
    return kept.get("sha256") == hashlib.sha256(path.read_bytes()).hexdigest()


def _write_task(
    benchmark: Benchmark,
    subtask: str,
    examples: Sequence[Example],
    num_rows: int | None,
    out: Path,
    *,
    source: Path,
    split: str,
    seed: int,
    left_out: Counter[str],
) -> BuiltTask:
    name = "_".join(filter(None, [benchmark.name, subtask]))
    if not examples:
        without = "".join(f", {count:,} {reason}" for reason, count in left_out.items())
        raise ValueError(
            f"{name}: no question of split {split!r} in {source}{without}; is it the benchmark's own folder?"
        )
    images = PictureFolder(out / benchmark.name)
    chosen = sample(examples, num_rows, seed)
    records = []
    for example in chosen:
        image_name = images.add(example.image, example.image_name, example.id)
        records.append(_record(replace(example, image_name=image_name)))
    content = _json_of(records)
    manifest = {
        "benchmark": benchmark.name,
        "subtask": subtask or None,
        "split": split,
        "evaluated": split in benchmark.evaluated,
        "seed": seed,
        "num_rows": len(records),
        "num_questions": len(examples),
        "left_out": dict(left_out),
        "sha256": hashlib.sha256(content).hexdigest(),
        "source": str(source.resolve()),
        "ids": [example.id for example in chosen],
    }
    with in_turn(out):
        put(out / f"{name}.json", content)
        put(out / f"{name}.manifest.json", _json_of(manifest))
    return BuiltTask(name, out / f"{name}.json", images.folder, len(records), len(examples), dict(left_out))


def _record(example: Example) -> dict[str, Any]:
    """An example as a LLaVA record.

    >>> _record(Example("7", Path("a.png"), "a.png", "Red?", "Yes"))["conversations"][0]["value"]
    '<image>\\nRed?'
    """
    return {
        "id": example.id,
        "image": example.image_name,
        "conversations": [
            {"from": "human", "value": f"<image>\n{example.prompt}"},
            {"from": "gpt", "value": example.answer},
        ],
    }


def sample(examples: Sequence[Example], num_rows: int | None, seed: int) -> list[Example]:
    """`num_rows` of `examples` without replacement, in their own order; all of them where there are no more.

    >>> one = Example("0", Path("a.png"), "a.png", "", "")
    >>> len(sample([one] * 9, 4, seed=0)), len(sample([one] * 9, None, seed=0))
    (4, 9)
    """
    if num_rows is None or num_rows >= len(examples):
        return list(examples)
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), num_rows))]


def _json_of(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
