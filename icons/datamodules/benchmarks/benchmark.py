"""A benchmark's published files, and the task file made of them: layout, seeded sample, provenance."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Example:
    """One question of a benchmark, in the words that LLaVA's evaluation asks it with."""

    id: str
    image: Path | Callable[[], bytes]
    """An image file of the source, or what reads the encoded image out of a table."""
    image_name: str
    """Its path inside the task's image folder, unique in the benchmark."""
    prompt: str
    answer: str
    subtask: str = ""
    """Set where the benchmark is a group of tasks (MME): one file is written per subtask."""


Reader = Callable[[Path, str], Iterator[Example]]


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


def build(
    benchmark: Benchmark, source: Path, out: Path, *, num_rows: int | None, split: str | None = None, seed: int = 0
) -> list[BuiltTask]:
    """Writes `out/NAME.json` (LLaVA JSON), its images below `out/NAME/`, and `out/NAME.manifest.json`.

    The sample depends on the benchmark's files, `split`, `num_rows` and `seed` alone, keeps the benchmark's order, and
    takes every question where there are no more than `num_rows`. A benchmark with subtasks becomes one file per
    subtask, `NAME_SUBTASK.json`, each with `num_rows` divided by their number, rounded up.

    Args:
        num_rows: size of the sample; None takes every question.
        split: one of `benchmark.splits`; None takes the first.

    Returns:
        One entry per written task file, in the order of the benchmark's subtasks.

    Raises:
        ValueError: unknown split, `num_rows` below 1, no question in the files, or files of another form.
        FileNotFoundError: a file of the benchmark's layout is missing; says where it is published.
    """
    split = benchmark.splits[0] if split is None else split
    if split not in benchmark.splits:
        raise ValueError(f"{benchmark.name}: no split {split!r} with public answers; has {', '.join(benchmark.splits)}")
    if num_rows is not None and num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}")
    try:
        examples = list(benchmark.read(source, split))
    except FileNotFoundError as error:
        wanted = "; ".join(f"{path} from {url}" for path, url in benchmark.downloads)
        raise FileNotFoundError(f"{benchmark.name}: {error}. The layout is: {wanted}") from error
    except KeyError as error:
        raise ValueError(f"{benchmark.name}: no {error} in {source}'s files; is it another version of them?") from error
    groups = {name: [one for one in examples if one.subtask == name] for name in benchmark.subtasks or ("",)}
    share = None if num_rows is None else -(-num_rows // len(groups))
    return [
        write_task(benchmark, subtask, group, share, out, source=source, split=split, seed=seed)
        for subtask, group in groups.items()
    ]


def write_task(
    benchmark: Benchmark,
    subtask: str,
    examples: Sequence[Example],
    num_rows: int | None,
    out: Path,
    *,
    source: Path,
    split: str,
    seed: int,
) -> BuiltTask:
    name = "_".join(filter(None, [benchmark.name, subtask]))
    if not examples:
        raise ValueError(f"{name}: no question of split {split!r} in {source}; is it the benchmark's own folder?")
    images = out / benchmark.name
    chosen = sample(examples, num_rows, seed)
    records = []
    for example in chosen:
        copy_image(example, images / example.image_name)
        records.append(record(example))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", records)
    manifest = {
        "benchmark": benchmark.name,
        "subtask": subtask or None,
        "split": split,
        "evaluated": split in benchmark.evaluated,
        "seed": seed,
        "num_rows": len(records),
        "num_questions": len(examples),
        "source": str(source.resolve()),
        "ids": [example.id for example in chosen],
    }
    write_json(out / f"{name}.manifest.json", manifest)
    return BuiltTask(name, out / f"{name}.json", images, len(records), len(examples))


def record(example: Example) -> dict[str, Any]:
    """An example as a LLaVA record.

    >>> record(Example("7", Path("a.png"), "a.png", "Red?", "Yes"))["conversations"][0]["value"]
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


def copy_image(example: Example, target: Path) -> None:
    if target.exists():  # several questions ask about one image
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")  # a copy cut short must not pass for the image
    if isinstance(example.image, Path):
        if not example.image.is_file():
            raise FileNotFoundError(f"question {example.id}: its image {example.image} is not there; unpack all images")
        shutil.copyfile(example.image, part)
    else:
        part.write_bytes(example.image())
    part.replace(target)


def write_json(path: Path, value: object) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def read_json(path: Path) -> Any:
    """A JSON file of a benchmark.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return msgspec.json.decode(path.read_bytes())
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download it again") from error


def read_lines(path: Path) -> Iterator[Any]:
    """The records of a JSON-lines file of a benchmark; empty lines are skipped.

    Raises:
        ValueError: a line is not JSON.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield msgspec.json.decode(line)
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error}); download it again") from error


def locate(source: Path, *patterns: str) -> Path:
    """The first path below `source` that fits one of the glob `patterns`, at most two folders deep.

    Raises:
        FileNotFoundError: none does.
    """
    for pattern in patterns:
        for depth in ("", "*/", "*/*/"):
            found = sorted(source.glob(depth + pattern))
            if found:
                return found[0]
    raise FileNotFoundError(f"no {' or '.join(patterns)} in {source}")


def majority(answers: Iterable[str]) -> str:
    """The answer that most annotators gave, compared without case and outer spaces; the first given on a tie.

    Raises:
        ValueError: no answer at all.

    >>> majority(["blue", "Red", "red "])
    'Red'
    """
    given = [answer.strip() for answer in answers]
    if not given:
        raise ValueError("a question has no answers; take a split whose answers are published")
    folded = [answer.casefold() for answer in given]
    winner = Counter(folded).most_common(1)[0][0]
    return given[folded.index(winner)]


def capital(answer: str) -> str:
    """First letter in upper case, as LLaVA-665K writes short answers ("Yes", "Left"). Other letters stay.

    >>> capital("red and Blue")
    'Red and Blue'
    """
    return answer[:1].upper() + answer[1:]


def short_answer(question: str) -> str:
    """A question with LLaVA's line for short answers (its docs/Evaluation.md, form 1).

    >>> print(short_answer("Red?"))
    Red?
    Answer the question using a single word or phrase.
    """
    return f"{question}\n{SHORT_ANSWER}"


def multiple_choice(question: str, options: Sequence[str], instruction: str = OPTION_LETTER) -> str:
    """A question with one line per lettered option (LLaVA's docs/Evaluation.md, form 2).

    >>> print(multiple_choice("Red?", ["yes", "no"]))
    Red?
    A. yes
    B. no
    Answer with the option's letter from the given choices directly.
    """
    lines = [f"{letter(i)}. {option}" for i, option in enumerate(options)]
    return "\n".join([question, *lines, instruction])


def letter(index: int) -> str:
    """The letter of an option: 0 is A."""
    return chr(ord("A") + index)
