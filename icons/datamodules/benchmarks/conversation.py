"""Questions asked as they are: LLaVA-Bench in the wild, MM-Vet, RealWorldQA."""

import glob
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from icons.datamodules.benchmarks.benchmark import Benchmark, Example
from icons.datamodules.benchmarks.files import locate, locate_beside, read_json, read_lines
from icons.datamodules.benchmarks.pictures import within


def _read_llava_bench(source: Path, split: str) -> Iterator[Example]:
    """The reference answers are GPT-4's, which LLaVA's evaluation compares with."""
    answers = {one["question_id"]: one["text"] for one in read_lines(locate(source, "answers_gpt4.jsonl"))}
    questions = locate(source, "questions.jsonl")
    images = locate_beside(questions, source, "images")
    for one in read_lines(questions):
        number, name = one["question_id"], one["image"]
        yield Example(str(number), within(images, name), name, one["text"], answers[number])


def _read_mmvet(source: Path, split: str) -> Iterator[Example]:
    questions = locate(source, "mm-vet.json")
    images = locate_beside(questions, source, "images")
    for number, one in read_json(questions).items():
        name = one["imagename"]
        yield Example(number, within(images, name), name, one["question"], _mmvet_answer(one["answer"]))


def _mmvet_answer(answer: str) -> str:
    """MM-Vet's notation as one answer: the first alternative, with all that it must name.

    >>> _mmvet_answer("left<AND>red<OR>port")
    'left, red'
    """
    return ", ".join(part.strip() for part in answer.split("<OR>")[0].split("<AND>"))


def _read_realworldqa(source: Path, split: str) -> Iterator[Example]:
    """From Hugging Face's Parquet files, or a folder with `annotations.json`. Questions hold their request."""
    tables = sorted(source.glob("**/test-*.parquet"))
    if tables:
        yield from _read_realworldqa_tables(tables)
        return
    path = locate(source, "annotations.json", "annotations.jsonl")
    for number, one in enumerate(read_json(path) if path.suffix == ".json" else read_lines(path)):
        name = Path(one["image"]).name
        image = locate(path.parent, glob.escape(name))
        yield Example(str(number), image, name, one["question"].strip(), one["answer"].strip())


def _read_realworldqa_tables(tables: list[Path]) -> Iterator[Example]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError("RealWorldQA is in Parquet files; install their reader: pip install pyarrow") from error
    number = 0
    for path in tables:
        try:
            table = parquet.ParquetFile(path)
            lacking = {"image", "question", "answer"} - set(table.schema_arrow.names)
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: cannot be read as Parquet ({reason}); download it again") from error
        if lacking:
            raise ValueError(f"{path}: has no column {min(lacking)}; is it another version of RealWorldQA?")
        for group in range(table.num_row_groups):
            for i, one in enumerate(table.read_row_group(group, columns=["question", "answer"]).to_pylist()):
                # the images are read at the end, for the sample alone: all of them take 700 MB
                image = partial(_parquet_image, table, group, i)
                yield Example(str(number), image, f"{number}.webp", one["question"].strip(), one["answer"].strip())
                number += 1


def _parquet_image(table: Any, group: int, index: int) -> bytes:
    cell = table.read_row_group(group, columns=["image"]).column("image")[index].as_py() or {}
    return cell.get("bytes") or b""


_LLAVA_BENCH = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
_MMVET = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"

CONVERSATION = (
    Benchmark(
        "llava_bench",
        "LLaVA-Bench in the wild: open questions on 24 images",
        (("questions.jsonl", _LLAVA_BENCH), ("answers_gpt4.jsonl", _LLAVA_BENCH), ("images/", _LLAVA_BENCH)),
        "question -> GPT-4's reference answer",
        ("test",),
        ("test",),
        _read_llava_bench,
    ),
    Benchmark(
        "mmvet",
        "MM-Vet: several abilities at once, open answers",
        (("mm-vet.json", _MMVET), ("images/", _MMVET)),
        "question -> the first accepted answer",
        ("test",),
        ("test",),
        _read_mmvet,
    ),
    Benchmark(
        "realworldqa",
        "RealWorldQA: photographs from cars and streets",
        (("data/test-*.parquet", "https://huggingface.co/datasets/xai-org/RealworldQA"),),
        "question with its own request (letter, word or number) -> the answer",
        ("test",),
        ("test",),
        _read_realworldqa,
    ),
)
