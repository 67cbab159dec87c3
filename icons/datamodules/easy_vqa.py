"""The demo's real data: easy-VQA (PyPI `easy-vqa`, MIT) laid out as a user's own LLaVA data would lie on disk.

easy-VQA has 4,000 + 1,000 images of one coloured shape each and 48,000 questions. The images are split once, so that
no image serves two ends: alignment of the start model, training pool, task validation, a development split that the
demo never reads (its settings were chosen there), and, from easy-VQA's own test part, the tasks' test files.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image, ImageChops, ImageEnhance

from icons.output import put, whole_file

Record = dict[str, Any]

_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
_SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("shape", "colour", "shape presence", "colour presence")

# which images of easy-VQA's training part serve what; its test part is the test split
SPLITS = {
    "alignment": range(0, 2400),
    "pool": range(2400, 3400),
    "validation": range(3400, 3600),
    "development": range(3600, 4000),
    "test": range(1000),
}

# each task mixes the question kinds in its own share, as benchmarks do
TASKS: dict[str, dict[str, float]] = {
    "general": {"shape": 0.25, "colour": 0.25, "shape presence": 0.25, "colour presence": 0.25},
    "shapes": {"shape": 0.50, "colour": 0.15, "shape presence": 0.25, "colour presence": 0.10},
    "colours": {"shape": 0.15, "colour": 0.50, "shape presence": 0.10, "colour presence": 0.25},
    "presence": {"shape": 0.10, "colour": 0.10, "shape presence": 0.40, "colour presence": 0.40},
}

# what the pool is made of, as shares of its records
POOL = {"good": 0.43, "wrong": 0.25, "duplicate": 0.12, "text-only": 0.20}


@dataclass(frozen=True)
class Question:
    """One question about one image."""

    image: Path
    text: str
    answer: str
    kind: str
    """one of `KINDS`"""


@dataclass(frozen=True)
class DemoData:
    """Where `make_demo_data` has put what."""

    pool: Path
    images: Path
    validation: dict[str, Path]
    test: dict[str, Path]


def make_demo_data(
    out: Path, *, num_pool: int = 3000, num_validation: int = 80, num_test: int = 400, seed: int = 0, test: str = "test"
) -> DemoData:
    """Writes the training pool, the tasks' validation and test files, and their images, as LLaVA-style JSON.

    Each pool record's `provenance` says whether it is `good`, `wrong` (an answer of the right kind that is false),
    `duplicate` (a good record's question again, its image moved by a pixel and dimmed) or `text-only` (no image, of no
    use to any task); `kind` names the question's kind. Both are for reports; nothing in the method reads them.
    The same arguments give the same bytes.

    Args:
        out: folder to write into: `pool.json`, `<task>.json`, `<task>_test.json`, `images/`.
        num_pool: records of the pool, in the shares of `POOL`.
        num_validation: records of each task's validation file, in the task's shares of `TASKS`.
        num_test: records of each task's test file.
        seed: of everything drawn.
        test: the split that test files are drawn from; `development` where settings are being chosen.
    """
    draw = random.Random(seed)
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    pool = draw_pool(questions("pool"), num_pool, images, draw)
    write_records(out / "pool.json", pool)
    files: dict[str, dict[str, Path]] = {"": {}, "_test": {}}
    for suffix, split, count in (("", "validation", num_validation), ("_test", test, num_test)):
        if suffix:  # a stream of its own: test files do not depend on the sizes of the others
            draw = random.Random(f"test {seed}")
        asked = questions(split)
        for task, shares in TASKS.items():
            drawn = draw_kinds(asked, shares, count, draw)
            records = [record(question, f"{task}{suffix}-{i}", images) for i, question in enumerate(drawn)]
            files[suffix][task] = out / f"{task}{suffix}.json"
            write_records(files[suffix][task], records)
    return DemoData(out / "pool.json", images, files[""], files["_test"])


def questions(split: str) -> list[Question]:
    """The questions about a split's images, in easy-VQA's order.

    Negated questions ("is there not a ...") are left out. Most presence questions have the answer "no"; as many "no"
    as "yes" are kept, those that come first.

    Raises:
        ValueError: the package `easy-vqa` is not installed.
    """
    try:
        import easy_vqa  # an extra: only the demo needs it
    except ModuleNotFoundError as error:
        raise ValueError("the demo's data: got no package easy-vqa; pip install 'icons-lightning[demo]'") from error
    is_test = split == "test"
    texts, answers, numbers = easy_vqa.get_test_questions() if is_test else easy_vqa.get_train_questions()
    paths = easy_vqa.get_test_image_paths() if is_test else easy_vqa.get_train_image_paths()
    wanted = SPLITS[split]
    asked = []
    for text, answer, number in zip(texts, answers, numbers, strict=True):
        if number in wanted and not {"not", "no"} & set(text.split()):
            asked.append(Question(Path(paths[number]), text, answer, kind_of(text, answer)))
    num_yes = {kind: sum(q.kind == kind and q.answer == "yes" for q in asked) for kind in KINDS}
    kept = []
    for question in asked:
        if question.answer == "no":
            num_yes[question.kind] -= 1
        if question.answer != "no" or num_yes[question.kind] >= 0:
            kept.append(question)
    return kept


def kind_of(text: str, answer: str) -> str:
    """What a question asks for, one of `KINDS`.

    >>> kind_of("what color is the circle?", "red"), kind_of("is a red shape present?", "no")
    ('colour', 'colour presence')
    """
    if answer in ("yes", "no"):
        return "shape presence" if any(shape in text for shape in _SHAPES) else "colour presence"
    return "shape" if answer in _SHAPES else "colour"


def draw_kinds(
    asked: Sequence[Question], shares: Mapping[str, float], count: int, draw: random.Random
) -> list[Question]:
    """`count` questions without repetition, each kind in its share (the last kind takes what rounding leaves)."""
    drawn: list[Question] = []
    for kind, share in shares.items():
        wanted = round(count * share) if kind != list(shares)[-1] else count - len(drawn)
        of_kind = [question for question in asked if question.kind == kind]
        drawn += draw.sample(of_kind, wanted)
    draw.shuffle(drawn)
    return drawn


def draw_pool(asked: Sequence[Question], count: int, images: Path, draw: random.Random) -> list[Record]:
    """The pool's records, shuffled; the question kinds in equal shares (see `make_demo_data`)."""
    num = {provenance: round(count * share) for provenance, share in POOL.items()}
    num["good"] = count - sum(num.values()) + num["good"]
    drawn = draw_kinds(asked, dict.fromkeys(KINDS, 1 / len(KINDS)), num["good"] + num["wrong"], draw)
    good, wrong = drawn[: num["good"]], drawn[num["good"] :]
    records = [record(question, "", images, provenance="good") for question in good]
    for question in wrong:
        falsified = record(question, "", images, provenance="wrong")
        falsified["conversations"][1]["value"] = wrong_answer(question, draw)
        records.append(falsified)
    for question in draw.sample(good, num["duplicate"]):
        name = Path("pool") / f"copy-{len(records)}-{question.image.name}"
        near_copy(question.image, images / name, draw)
        records.append(record(question, "", images, provenance="duplicate", image=name))
    records += [text_only(draw) for _ in range(num["text-only"])]
    draw.shuffle(records)
    for number, entry in enumerate(records):
        entry["id"] = f"pool-{number}"
    return records


def record(
    question: Question, name: str, images: Path, *, provenance: str = "good", image: Path | None = None
) -> Record:
    """A LLaVA-style record; the image is copied below `images` unless `image` says where there it already lies."""
    if image is None:
        image = Path(question.image.parent.parent.name) / question.image.name  # train/12.png, test/12.png
        put(images / image, question.image.read_bytes())
    return {
        "id": name,
        "image": image.as_posix(),
        "conversations": [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ],
        "kind": question.kind,
        "provenance": provenance,
    }


def wrong_answer(question: Question, draw: random.Random) -> str:
    """A false answer of the right kind."""
    choices = next(c for c in (_COLOURS, _SHAPES, ("yes", "no")) if question.answer in c)
    return draw.choice([answer for answer in choices if answer != question.answer])


def near_copy(source: Path, target: Path, draw: random.Random) -> None:
    """Saves the image moved by one pixel and slightly dimmed: nothing that changes an answer."""
    with Image.open(source) as image, whole_file(target, durable=False) as partial:
        moved = ImageChops.offset(image.convert("RGB"), draw.choice((-1, 1)), draw.choice((-1, 1)))
        ImageEnhance.Brightness(moved).enhance(draw.uniform(0.95, 0.99)).save(partial)


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_THINGS = (
    "boat",
    "bread",
    "chair",
    "cloud",
    "garden",
    "horse",
    "letter",
    "mountain",
    "river",
    "song",
    "train",
    "winter",
)


def text_only(draw: random.Random) -> Record:
    """A right and useless record without an image: small sums, and lists of words to reverse or count."""
    first, second = draw.randrange(5), draw.randrange(5)
    words = draw.sample(_THINGS, draw.randrange(2, 5))
    asked, answer = draw.choice(
        (
            (f"how much is {NUMBERS[first]} plus {NUMBERS[second]}?", NUMBERS[first + second]),
            (f"say the words in reverse: {' '.join(words)}", " ".join(reversed(words))),
            (f"how many words are here: {' '.join(words)}?", NUMBERS[len(words)]),
        )
    )
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": "", "conversations": turns, "kind": "text", "provenance": "text-only"}


def alignment_samples() -> list[tuple[Path, str, str]]:
    """What the start model is aligned on: image, plain question (empty for a caption), answer or caption.

    Captions are made from what the questions tell of an image; images and questions are those of no other split.
    """
    facts: dict[Path, set[str]] = {}
    samples = []
    for question in questions("alignment"):
        samples.append((question.image, question.text, question.answer))
        words = question.text.rstrip("?").split() if question.answer == "yes" else [question.answer]
        facts.setdefault(question.image, set()).update(words)
        if question.answer not in ("yes", "no"):
            facts[question.image].update(question.text.rstrip("?").split())
    for image, told in facts.items():
        colour, shape = told & set(_COLOURS), told & set(_SHAPES)
        if colour and shape:
            samples.append((image, "", f"a {colour.pop()} {shape.pop()}"))
    return samples


def write_records(path: Path, records: Sequence[Record]) -> None:
    put(path, msgspec.json.format(msgspec.json.encode(records), indent=1))
