"""Lettered options: ScienceQA (questions with an image), MMBench in English and Chinese, AI2D."""

import base64
import csv
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from icons.datamodules.benchmarks.benchmark import Benchmark, Example, LeftOut
from icons.datamodules.benchmarks.files import locate, read_json, read_text
from icons.datamodules.benchmarks.pictures import within
from icons.datamodules.benchmarks.wording import OPTION_LETTER, letter, multiple_choice, unanswerable

_CHINESE_OPTION_LETTER = "请直接回答选项字母。"
_EMPTY = {"", "#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan", "<na>", "n/a", "na", "nan"}
_EMPTY |= {"none", "null"}
"""What pandas, with which LLaVA reads MMBench's tables, takes for an empty field."""
_LONGEST_FIELD = 1 << 27
"""Characters of an MMBench field: an encoded image is far above the csv module's own limit."""


def _read_scienceqa(source: Path, split: str) -> Iterator[Example | LeftOut]:
    """LLaVA's form CQM-A (context, question, options in one line) and then its option-letter line.

    Source: LLaVA's scripts/convert_sqa_to_llava_base_prompt.py, llava/eval/model_vqa_science.py.
    """
    problems = read_json(locate(source, "problems.json"))
    images = locate(source, f"images/{split}", split)
    for number in read_json(locate(source, "pid_splits.json"))[split]:
        one = problems[number]
        if not one["image"]:
            continue
        if reason := unanswerable(one["choices"], one["answer"]):
            yield LeftOut(reason)
            continue
        options = " ".join(f"({letter(i)}) {choice}" for i, choice in enumerate(one["choices"]))
        prompt = f"Context: {one['hint'].strip() or 'N/A'}\nQuestion: {one['question']}\nOptions: {options}\n"
        prompt = prompt.replace("  ", " ").strip()
        name = f"{number}/{one['image']}"
        yield Example(number, within(images, name), name, f"{prompt}\n{OPTION_LETTER}", letter(one["answer"]))


def _read_mmbench(source: Path, split: str, *, files: tuple[str, ...], instruction: str) -> Iterator[Example | LeftOut]:
    """Options end at the first empty one. Source: LLaVA's llava/eval/model_vqa_mmbench.py."""
    csv.field_size_limit(max(_LONGEST_FIELD, csv.field_size_limit()))
    with locate(source, *files).open(encoding="utf-8-sig", newline="") as table:
        reader = csv.DictReader(table, delimiter="\t")
        if lacking := {"index", "question", "A", "B", "answer", "image"} - set(reader.fieldnames or []):
            raise KeyError(min(lacking))
        rows = {row["index"]: row for row in reader}
    for index, row in rows.items():
        if _is_empty(row.get("answer")):
            continue
        options = list(takewhile(lambda option: not _is_empty(option), (row.get(name, "") for name in "ABCD")))
        answer = row["answer"].strip()
        if reason := unanswerable(options, ord(answer) - ord("A") if len(answer) == 1 else None):
            yield LeftOut(reason)
            continue
        question = row["question"] if _is_empty(row.get("hint")) else f"{row['hint']}\n{row['question']}"
        # a question that shares its image names the row that holds it (from version 1.1 on)
        encoded = rows[row["image"]]["image"] if row["image"] in rows else row["image"]
        prompt = multiple_choice(question, options, instruction)
        yield Example(index, partial(base64.b64decode, encoded), f"{index}.jpg", prompt, answer)


def _is_empty(field: str | None) -> bool:
    return (field or "").strip().lower() in _EMPTY


def _read_ai2d(source: Path, split: str) -> Iterator[Example | LeftOut]:
    """Questions about letters in the diagram need its version with letters drawn in, from `abc_images/` where it is.

    Without that folder, those questions are left out.
    """
    tested = set(read_text(locate(source, "ai2d_test_ids.csv")).split())
    questions = locate(source, "questions")
    for path in sorted(questions.glob("*.json")):
        diagram = read_json(path)
        name = diagram["imageName"]
        if (Path(name).stem in tested) != (split == "test"):
            continue
        for text, one in diagram["questions"].items():
            yield from _ai2d_question(questions.parent, name, text, one)


def _ai2d_question(source: Path, name: str, text: str, one: Mapping[str, Any]) -> Iterator[Example | LeftOut]:
    folder = source / ("abc_images" if one.get("abcLabel") else "images")
    # an option that was not transcribed is an empty object, as text or not
    options = ["" if option in ({}, "{}", None) else str(option) for option in one.get("answerTexts") or []]
    correct = one.get("correctAnswer")
    if reason := unanswerable(options, correct):
        yield LeftOut(reason)
    elif not folder.is_dir():
        yield LeftOut(f"about letters in the diagram, and there is no {folder.name}/")
    else:
        image_name = f"{folder.name}/{name}"
        prompt = multiple_choice(text, options)
        yield Example(str(one["questionId"]), within(folder, name), image_name, prompt, letter(int(correct or 0)))


_MMBENCH = "https://download.openmmlab.com/mmclassification/datasets/mmbench"
_SCIENCEQA = "https://github.com/lupantech/ScienceQA (data/scienceqa; images by its tools/download.sh)"

OPTIONS = (
    Benchmark(
        "scienceqa",
        "ScienceQA: school questions, those with an image",
        (("problems.json", _SCIENCEQA), ("pid_splits.json", _SCIENCEQA), ("images/val/", _SCIENCEQA)),
        "context, question, options in one line, option-letter line -> the letter",
        ("val", "train", "test"),
        ("test",),
        _read_scienceqa,
    ),
    Benchmark(
        "mmbench",
        "MMBench (English): abilities by multiple choice",
        (("mmbench_dev_20230712.tsv", f"{_MMBENCH}/mmbench_dev_20230712.tsv"),),
        "hint, question, one line per option, option-letter line -> the letter",
        ("dev",),
        ("dev",),
        partial(
            _read_mmbench,
            files=("mmbench_dev_2*.tsv", "mmbench_dev_en*.tsv", "MMBench_DEV_EN*.tsv"),
            instruction=OPTION_LETTER,
        ),
    ),
    Benchmark(
        "mmbench_cn",
        "MMBench (Chinese): the same questions translated",
        (("mmbench_dev_cn_20231003.tsv", f"{_MMBENCH}/mmbench_dev_cn_20231003.tsv"),),
        "hint, question, one line per option, option-letter line in Chinese -> the letter",
        ("dev",),
        ("dev",),
        partial(
            _read_mmbench, files=("mmbench_dev_cn*.tsv", "MMBench_DEV_CN*.tsv"), instruction=_CHINESE_OPTION_LETTER
        ),
    ),
    Benchmark(
        "ai2d",
        "AI2D: school-book diagrams",
        (
            ("questions/", "https://ai2-public-datasets.s3.amazonaws.com/diagrams/ai2d-all.zip"),
            ("images/", "https://ai2-public-datasets.s3.amazonaws.com/diagrams/ai2d-all.zip"),
            ("ai2d_test_ids.csv", "https://s3-us-east-2.amazonaws.com/prior-datasets/ai2d_test_ids.csv"),
            ("abc_images/ (if you have it)", "diagrams with letters in place of the labels"),
        ),
        "question, one line per option, option-letter line -> the letter",
        ("train", "test"),
        ("test",),
        _read_ai2d,
    ),
)
