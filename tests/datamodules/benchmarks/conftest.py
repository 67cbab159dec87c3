"""Small folders in each benchmark's published layout: three or four questions, images of a few pixels."""

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from icons.datamodules.benchmarks.yes_no import MME_SUBTASKS


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, values: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def image(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(colour))


def vqav2(folder: Path) -> None:
    questions, annotations = [], []
    for i, (question, given) in enumerate(
        [
            ("Is it red?", ["yes"] * 6 + ["no"] * 4),
            ("What colour?", ["blue", "Red", "red", "red"]),
            ("How many?", ["2"]),
        ]
    ):
        image(folder / "val2014" / f"COCO_val2014_{i + 42:012d}.jpg", i)
        questions.append({"image_id": i + 42, "question": question, "question_id": 42000 + i})
        answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": k} for k, answer in enumerate(given)]
        annotations.append({"question_id": 42000 + i, "image_id": i + 42, "answers": answers})
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def gqa(folder: Path) -> None:
    for split in ("val", "testdev"):
        rows = {f"{split}{i}": {"imageId": f"n{i}", "question": f"Side {i}?", "answer": "left"} for i in range(3)}
        write(folder / f"{split}_balanced_questions.json", rows)
    for i in range(3):
        image(folder / "images" / f"n{i}.jpg", i)


def vizwiz(folder: Path) -> None:
    rows = []
    for i, word in enumerate(["unanswerable", "soup", "basil"]):
        name = f"VizWiz_val_{i:08d}.jpg"
        image(folder / "val" / name, i)
        answers = [{"answer": word, "answer_confidence": "yes"}] * 6 + [
            {"answer": "can", "answer_confidence": "no"}
        ] * 4
        rows.append({"image": name, "question": "What is this?", "answers": answers, "answerable": i > 0})
    write(folder / "Annotations" / "val.json", rows)


def textvqa(folder: Path) -> None:
    rows, readings = [], []
    for i in range(3):
        image(folder / "train_images" / f"ab{i}.jpg", i)
        rows.append({"question_id": i, "image_id": f"ab{i}", "question": "what brand?", "answers": ["dakota"] * 10})
        readings.append({"image_id": f"ab{i}", "ocr_tokens": ["dakota", "DIGITAL"]})
    for split in ("train", "val"):
        write(folder / f"TextVQA_0.5.1_{split}.json", {"data": rows})
        write(folder / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", {"data": readings})


def scienceqa(folder: Path) -> None:
    problems = {
        "1": {"question": "Which?", "choices": ["west", "east"], "answer": 1, "hint": "", "image": "image.png"},
        "2": {"question": "Why?", "choices": ["a", "b"], "answer": 0, "hint": "Text alone.", "image": None},
        "3": {"question": "Where?  ", "choices": ["x", "y", "z"], "answer": 2, "hint": "A map.", "image": "image.png"},
    }
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": [], "val": ["1", "2", "3"], "test": []})
    for number in ("1", "3"):
        image(folder / "images" / "val" / number / "image.png", int(number))


def mmbench_table(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    encoded = base64.b64encode(png(1)).decode()
    with path.open("w", encoding="utf-8", newline="") as table:
        rows = csv.writer(table, delimiter="\t")
        rows.writerow(columns)
        rows.writerow(["0", "Which one?", "Look\nclosely.", "cat", "dog", "", "nan", "B", "animals", encoded])
        rows.writerow(["7", "How many?", "nan", "1", "2", "3", "4", "D", "counting", encoded])
        rows.writerow(["1000007", "How many?", "", "2", "3", "4", "1", "C", "counting", "7"])
        rows.writerow(["8", "Hidden?", "", "1", "2", "3", "4", "", "test part", encoded])


def mmbench(folder: Path) -> None:
    mmbench_table(folder / "mmbench_dev_20230712.tsv")


def mmbench_cn(folder: Path) -> None:
    mmbench_table(folder / "mmbench_dev_cn_20231003.tsv")


def ai2d(folder: Path) -> None:
    for i in range(4):
        question = {"abcLabel": i == 2, "answerTexts": ["sun", "moon", "both", "none"], "correctAnswer": i}
        image(folder / "ai2d" / "images" / f"{i}.png", i)
        text = f"What is {i}?"
        write(
            folder / "ai2d" / "questions" / f"{i}.png.json",
            {"imageName": f"{i}.png", "questions": {text: question | {"questionId": f"{i}.png-0"}}},
        )
    (folder / "ai2d" / "ai2d_test_ids.csv").write_text("3\n", encoding="utf-8")


def pope(folder: Path) -> None:
    for part in ("adversarial", "popular", "random"):
        rows = []
        for i, label in enumerate(["yes", "no"]):
            name = f"COCO_val2014_{i:012d}.jpg"
            image(folder / "val2014" / name, i)
            rows.append({"question_id": i + 1, "image": name, "text": "Is there a dog?", "label": label})
        write_lines(folder / "coco" / f"coco_pope_{part}.json", rows)


def mme(folder: Path) -> None:
    for subtask in MME_SUBTASKS:
        root = folder / "MME_Benchmark_release_version" / subtask
        large = subtask in ("posters", "landmark")  # these two keep images and questions apart
        image((root / "images" if large else root) / "0001.jpg")
        questions = (root / "questions_answers_YN" if large else root) / "0001.txt"
        questions.parent.mkdir(parents=True, exist_ok=True)
        questions.write_text(
            "Is it red? Please answer yes or no.\tYes\nIs it\tblue? Please answer yes or no.\tNo\n", encoding="utf-8"
        )
    image(folder / "MME_Benchmark_release_version" / "artwork" / "0001.jpg")


def llava_bench(folder: Path) -> None:
    image(folder / "images" / "001.jpg")
    questions = [{"question_id": i, "image": "001.jpg", "text": f"Tell {i}.", "category": "conv"} for i in range(3)]
    write_lines(folder / "questions.jsonl", questions)
    write_lines(folder / "answers_gpt4.jsonl", [{"question_id": i, "text": f"Told {i}."} for i in range(3)])


def mmvet(folder: Path) -> None:
    rows = {
        "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr"]},
        "v1_1": {"imagename": "v1_1.png", "question": "Who?", "answer": "Ann<OR>Anna", "capability": ["know"]},
    }
    for one in rows.values():
        image(folder / "mm-vet" / "images" / str(one["imagename"]))
    write(folder / "mm-vet" / "mm-vet.json", rows)


def realworldqa(folder: Path) -> None:
    rows = [{"image": f"{i}.webp", "question": f"{i}?\nPlease answer.", "answer": "A"} for i in range(3)]
    for i in range(3):
        image(folder / "images" / f"{i}.webp", i)
    write(folder / "annotations.json", rows)


def chartqa(folder: Path) -> None:
    root = folder / "ChartQA Dataset" / "val"
    image(root / "png" / "12.png")
    write(root / "val_human.json", [{"imgname": "12.png", "query": "How high?", "label": "0.57"}])
    write(root / "val_augmented.json", [{"imgname": "12.png", "query": "Which year?", "label": "2014"}])


def docvqa(folder: Path) -> None:
    image(folder / "spdocvqa_images" / "ffbf0023_4.png")
    row = {
        "questionId": 49153,
        "question": "What day?",
        "image": "documents/ffbf0023_4.png",
        "answers": ["May 1", "1 May"],
    }
    write(folder / "spdocvqa_qas" / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [row]})


def infovqa(folder: Path) -> None:
    image(folder / "infographicsvqa_images" / "38247.jpeg")
    row = {
        "questionId": 98313,
        "question": "Which network?",
        "image_local_name": "38247.jpeg",
        "answers": ["pinterest"],
    }
    write(folder / "infographicsVQA_val_v1.0_withQT.json", {"dataset_name": "infographicVQA", "data": [row]})


LAYOUTS: dict[str, Callable[[Path], None]] = {
    layout.__name__: layout
    for layout in (
        *(vqav2, gqa, vizwiz, textvqa, scienceqa, mmbench, mmbench_cn, ai2d, pope, mme),
        *(llava_bench, mmvet, realworldqa, chartqa, docvqa, infovqa),
    )
}


@pytest.fixture
def layout(tmp_path: Path) -> Callable[[str], Path]:
    """Makes the folder of a benchmark by name, and returns it."""

    def make(name: str) -> Path:
        folder = tmp_path / "source" / name
        LAYOUTS[name](folder)
        return folder

    return make
