"""Yes or no: POPE (does the photograph show it?) and MME's subtasks."""

from collections.abc import Iterator
from pathlib import Path

from icons.datamodules.benchmarks.benchmark import Benchmark, Example, LeftOut
from icons.datamodules.benchmarks.files import locate, read_lines, read_text
from icons.datamodules.benchmarks.pictures import within
from icons.datamodules.benchmarks.wording import capital, short_answer

_POPE_PARTS = ("adversarial", "popular", "random")
MME_SUBTASKS = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "OCR"),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
"""The 13 that the original code of ICONS takes the maximum over. MME's fourteenth, `artwork`, is not among them."""
_MME_REQUEST = "Please answer yes or no."


def _read_pope(source: Path, split: str) -> Iterator[Example]:
    images = locate(source, "val2014")
    for part in _POPE_PARTS:
        for one in read_lines(locate(source, f"coco_pope_{part}.json")):
            name = one["image"]
            number = f"{part}_{one['question_id']}"
            yield Example(number, within(images, name), name, short_answer(one["text"]), capital(one["label"]))


def _read_mme(source: Path, split: str) -> Iterator[Example | LeftOut]:
    """Questions lie as `IMAGE.txt`, one `question TAB Yes|No` a line: beside the images, or in a folder of their own.

    LLaVA asks without MME's "Please answer yes or no." and with its own short-answer line.
    """
    root = locate(source, MME_SUBTASKS[0]).parent
    for subtask in MME_SUBTASKS:
        folder = root / subtask
        if not folder.is_dir():
            raise FileNotFoundError(f"no {subtask}/ in {root}")
        split_folders = (folder / "images").is_dir()
        questions = folder / "questions_answers_YN" if split_folders else folder
        images = folder / "images" if split_folders else folder
        pictures = {path.stem: path for path in sorted(images.iterdir()) if path.is_file() and path.suffix != ".txt"}
        for path in sorted(questions.glob("*.txt")):
            if path.stem not in pictures:
                raise FileNotFoundError(
                    f"no image {path.stem}.jpg or .png in {images} for the questions in {path.name}"
                )
            picture = pictures[path.stem]
            for number, line in enumerate(read_text(path).split("\n")):
                if not line.strip():
                    continue
                question, _, answer = line.rpartition("\t")
                question = question.replace(_MME_REQUEST, "").strip()
                if not question or answer.strip().lower() not in ("yes", "no"):
                    yield LeftOut(f"{subtask}: a line that is no question, tab, and Yes or No")
                    continue
                yield Example(
                    f"{subtask}_{path.stem}_{number}",
                    picture,
                    f"{subtask}/{picture.name}",
                    short_answer(question),
                    capital(answer.strip().lower()),
                    subtask,
                )


_POPE = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"

YES_NO = (
    Benchmark(
        "pope",
        "POPE: objects that a photograph shows, or does not",
        (
            *((f"coco_pope_{part}.json", _POPE) for part in _POPE_PARTS),
            ("val2014/", "http://images.cocodataset.org/zips/val2014.zip"),
        ),
        "question, short-answer line -> Yes or No",
        ("test",),
        ("test",),
        _read_pope,
    ),
    Benchmark(
        "mme",
        "MME: perception and cognition, a group of 13 subtasks",
        (
            (
                "MME_Benchmark_release_version/",
                "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
            ),
        ),
        "question, short-answer line -> Yes or No; one file per subtask",
        ("test",),
        ("test",),
        _read_mme,
        MME_SUBTASKS,
    ),
)
