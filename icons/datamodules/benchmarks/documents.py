"""Charts, documents and infographics: ChartQA, DocVQA, InfoVQA (three of the paper's unseen tasks)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from icons.datamodules.benchmarks.benchmark import Benchmark, Example
from icons.datamodules.benchmarks.files import locate, locate_beside, read_json
from icons.datamodules.benchmarks.pictures import within
from icons.datamodules.benchmarks.wording import short_answer

_SINGLE_WORD = "Answer the question with a single word."


def _read_chartqa(source: Path, split: str) -> Iterator[Example]:
    """LLaVA does not evaluate on it; the request is lmms-eval's, as all of these benchmarks' is."""
    images = locate(source, f"{split}/png")
    for part in ("human", "augmented"):
        for number, one in enumerate(read_json(images.parent / f"{split}_{part}.json")):
            name = one["imgname"]
            prompt = f"{one['query']}\n{_SINGLE_WORD}"
            yield Example(f"{part}_{number}", within(images, name), name, prompt, str(one["label"]))


def _read_docvqa(source: Path, split: str) -> Iterator[Example]:
    path = locate(source, f"{split}_v1.0_withQT.json", f"{split}_v1.0.json")
    images = locate_beside(path, source, "documents", "spdocvqa_images")
    for one in read_json(path)["data"]:
        yield _example_of(one, images, Path(one["image"]).name)


def _read_infovqa(source: Path, split: str) -> Iterator[Example]:
    path = locate(source, f"infographicsVQA_{split}_v1.0_withQT.json", f"infographic*VQA_{split}_v1.0.json")
    images = locate_beside(path, source, "infographicsvqa_images", f"infographic*{split}*images", "infographic*images")
    for one in read_json(path)["data"]:
        yield _example_of(one, images, one["image_local_name"])


def _example_of(one: Mapping[str, Any], images: Path, name: str) -> Example:
    """The first of the accepted answers is taken: they are spellings of one answer, not votes."""
    question, answer = short_answer(one["question"]), one["answers"][0]
    return Example(str(one["questionId"]), within(images, name), name, question, answer)


_RRC = "https://rrc.cvc.uab.es/?ch=17&com=downloads"

DOCUMENTS = (
    Benchmark(
        "chartqa",
        "ChartQA: questions about charts",
        (
            ("ChartQA Dataset/val/val_human.json", "https://github.com/vis-nlp/ChartQA (the folder of this name)"),
            ("ChartQA Dataset/val/val_augmented.json", "the same"),
            ("ChartQA Dataset/val/png/", "the same"),
        ),
        "question, single-word line -> the label",
        ("val", "train", "test"),
        ("test",),
        _read_chartqa,
    ),
    Benchmark(
        "docvqa",
        "DocVQA: questions about scanned documents (task 1)",
        (
            ("spdocvqa_qas/val_v1.0_withQT.json", f"{_RRC} (Single Document VQA, annotations)"),
            ("spdocvqa_images/", f"{_RRC} (Single Document VQA, images)"),
        ),
        "question, short-answer line -> the first accepted answer",
        ("val", "train"),
        ("val",),
        _read_docvqa,
    ),
    Benchmark(
        "infovqa",
        "InfoVQA: questions about infographics (task 3)",
        (
            ("infographicsVQA_val_v1.0_withQT.json", f"{_RRC} (Infographics VQA, annotations)"),
            ("infographicsvqa_images/", f"{_RRC} (Infographics VQA, images)"),
        ),
        "question, short-answer line -> the first accepted answer",
        ("val", "train"),
        ("val",),
        _read_infovqa,
    ),
)
