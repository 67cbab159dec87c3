"""Short answers about photographs: VQAv2, GQA, VizWiz, TextVQA; majority answers where ten annotators gave theirs."""

from collections.abc import Iterator
from pathlib import Path

from icons.datamodules.benchmarks.benchmark import Benchmark, Example
from icons.datamodules.benchmarks.files import locate, read_json
from icons.datamodules.benchmarks.pictures import within
from icons.datamodules.benchmarks.wording import SHORT_ANSWER, capital, majority, short_answer


def _read_vqav2(source: Path, split: str) -> Iterator[Example]:
    questions = read_json(locate(source, f"v2_OpenEnded_mscoco_{split}2014_questions.json"))["questions"]
    annotations = read_json(locate(source, f"v2_mscoco_{split}2014_annotations.json"))["annotations"]
    answers = {one["question_id"]: majority(answer["answer"] for answer in one["answers"]) for one in annotations}
    images = locate(source, f"{split}2014")
    for one in questions:
        name = f"COCO_{split}2014_{one['image_id']:012d}.jpg"
        answer = capital(answers[one["question_id"]])
        yield Example(str(one["question_id"]), within(images, name), name, short_answer(one["question"]), answer)


def _read_gqa(source: Path, split: str) -> Iterator[Example]:
    questions = read_json(locate(source, f"{split}_balanced_questions.json"))
    images = locate(source, "images")
    for number, one in questions.items():
        name = f"{one['imageId']}.jpg"
        yield Example(number, within(images, name), name, short_answer(one["question"]), capital(one["answer"]))


def _read_vizwiz(source: Path, split: str) -> Iterator[Example]:
    questions = read_json(locate(source, f"Annotations/{split}.json", f"annotations/{split}.json", f"{split}.json"))
    images = locate(source, split)
    instruction = "When the provided information is insufficient, respond with 'Unanswerable'."
    for one in questions:
        name = one["image"]
        prompt = f"{one['question']}\n{instruction}\n{SHORT_ANSWER}"
        answer = capital(majority(answer["answer"] for answer in one["answers"]))
        yield Example(Path(name).stem, within(images, name), name, prompt, answer)


def _read_textvqa(source: Path, split: str) -> Iterator[Example]:
    """LLaVA's evaluation tells the model the text that Rosetta read in the image; so is it here, from the same file."""
    questions = read_json(locate(source, f"TextVQA_0.5.1_{split}.json"))["data"]
    readings = read_json(locate(source, f"TextVQA_Rosetta_OCR_v0.2_{split}.json"))["data"]
    tokens = {one["image_id"]: one["ocr_tokens"] for one in readings}
    images = locate(source, "train_images")
    for one in questions:
        name = f"{one['image_id']}.jpg"
        read = f"Reference OCR token: {', '.join(tokens[one['image_id']])}"
        prompt = short_answer(f"{capital(one['question'])}\n{read}")
        yield Example(str(one["question_id"]), within(images, name), name, prompt, capital(majority(one["answers"])))


_COCO = "http://images.cocodataset.org/zips"
_VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
_TEXTVQA = "https://dl.fbaipublicfiles.com/textvqa"

NATURAL_IMAGES = (
    Benchmark(
        "vqav2",
        "VQAv2: open questions on COCO photographs",
        (
            ("v2_OpenEnded_mscoco_val2014_questions.json", f"{_VQA}/v2_Questions_Val_mscoco.zip"),
            ("v2_mscoco_val2014_annotations.json", f"{_VQA}/v2_Annotations_Val_mscoco.zip"),
            ("val2014/", f"{_COCO}/val2014.zip"),
        ),
        "question, short-answer line -> the majority answer of ten",
        ("val", "train"),
        (),
        _read_vqav2,
    ),
    Benchmark(
        "gqa",
        "GQA: compositional questions on scene graphs",
        (
            ("val_balanced_questions.json", "https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip"),
            ("images/", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"),
        ),
        "question, short-answer line -> the answer",
        ("val", "train", "testdev"),
        ("testdev",),
        _read_gqa,
    ),
    Benchmark(
        "vizwiz",
        "VizWiz: questions of blind people about their own photographs",
        (
            ("Annotations/val.json", "https://vizwiz.cs.colorado.edu/VizWiz_final/vqa_data/Annotations.zip"),
            ("val/", "https://vizwiz.cs.colorado.edu/VizWiz_final/images/val.zip"),
        ),
        "question, when to say 'Unanswerable', short-answer line -> the majority answer of ten",
        ("val", "train"),
        (),
        _read_vizwiz,
    ),
    Benchmark(
        "textvqa",
        "TextVQA: questions about text in photographs",
        (
            ("TextVQA_0.5.1_train.json", f"{_TEXTVQA}/data/TextVQA_0.5.1_train.json"),
            (
                "TextVQA_Rosetta_OCR_v0.2_train.json",
                f"{_TEXTVQA}/data/TextVQA_Rosetta_OCR_v0.2_train.json",
            ),
            ("train_images/", f"{_TEXTVQA}/images/train_val_images.zip"),
        ),
        "question, Rosetta's reading of the image, short-answer line -> the majority answer of ten",
        ("train", "val"),
        ("val",),
        _read_textvqa,
    ),
)
