"""What benchmarks' files really hold, and what they must not do: names that lead away, broken tables, odd lines."""

import base64
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icons.datamodules.benchmarks import BENCHMARKS, BuiltTask, build

Layout = Callable[[str], Path]


def built(name: str, source: Path, out: Path, **options: Any) -> BuiltTask:
    return build(BENCHMARKS[name], source, out, **({"num_rows": None} | options))[0]


def questions(task: BuiltTask) -> list[str]:
    return [one["conversations"][0]["value"] for one in json.loads(task.path.read_text(encoding="utf-8"))]


def edit(file: Path, change: Callable[[Any], None]) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    change(found)
    file.write_text(json.dumps(found), encoding="utf-8")


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret"])
def test_no_name_leads_out_of_source_or_out(name: str, layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_text("mine")
    pope, mmvet, mmbench = layout("pope"), layout("mmvet"), layout("mmbench")
    for part in ("adversarial", "popular", "random"):
        rewrite(pope / "coco" / f"coco_pope_{part}.json", "COCO_val2014_000000000000.jpg", json.dumps(name)[1:-1])
    rewrite(mmvet / "mm-vet" / "mm-vet.json", "v1_0.png", json.dumps(name)[1:-1])
    rewrite(mmbench / "mmbench_dev_20230712.tsv", "\n7\t", f"\n{name}\t")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    for benchmark, source in (("pope", pope), ("mmvet", mmvet), ("mmbench", mmbench)):
        with pytest.raises(ValueError, match=r"(leads out of|expected the name of a file in) .*"):
            built(benchmark, source, tmp_path / "out")
    after = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path).parts[0] for path in after - before} <= {"out"}
    assert (tmp_path / "secret.jpg").read_text() == "mine"


def test_a_link_leads_nowhere_else(layout: Layout, tmp_path: Path) -> None:
    source = layout("gqa")
    (tmp_path / "secret.jpg").write_text("mine")
    (source / "images" / "n1.jpg").unlink()
    (source / "images" / "n1.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ValueError, match=r"'n1.jpg': is a link that leads out of"):
        built("gqa", source, tmp_path / "out")
    (source / "images").rename(tmp_path / "photos")  # the whole folder elsewhere is the user's own doing
    (tmp_path / "photos" / "n1.jpg").unlink()
    (tmp_path / "photos" / "n1.jpg").write_bytes(b"image")
    (source / "images").symlink_to(tmp_path / "photos")
    assert built("gqa", source, tmp_path / "out").num_rows == 3
    (tmp_path / "out" / "gqa" / "n1.jpg").unlink()
    (tmp_path / "out" / "gqa" / "n1.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ValueError, match=r"'n1.jpg': is a link that leads out of"):
        built("gqa", source, tmp_path / "out")
    assert (tmp_path / "secret.jpg").read_text() == "mine"


def mmbench_rows(source: Path, rows: list[list[str]], name: str = "mmbench_dev_20230712.tsv") -> None:
    source.mkdir(exist_ok=True)
    with (source / name).open("w", encoding="utf-8", newline="") as table:
        columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
        csv.writer(table, delimiter="\t").writerows([columns, *rows])


def row(index: str, image: bytes, options: str = "cat dog", answer: str = "A") -> list[str]:
    lettered = [*options.split(), "", "", "", ""][:4]
    return [index, "Which?", "", *lettered, answer, "animals", base64.b64encode(image).decode()]


def test_a_task_built_anew_has_the_new_images(tmp_path: Path) -> None:
    for version in (b"first", b"second"):
        mmbench_rows(tmp_path / "source", [row("1", version)])
        task = built("mmbench", tmp_path / "source", tmp_path / "out")
        assert (task.images / "1.jpg").read_bytes() == version


def test_two_images_of_one_name_are_two_files(layout: Layout, tmp_path: Path) -> None:
    source = layout("realworldqa")
    (source / "other").mkdir()
    (source / "images" / "0.webp").rename(source / "other" / "0.webp")
    task = built("realworldqa", source, tmp_path / "out")
    assert len(list(task.images.glob("*.webp"))) == 3
    mmbench_rows(tmp_path / "m", [row("1", b"one"), row("1 ", b"two"), row("./1", b"three")])
    task = built("mmbench", tmp_path / "m", tmp_path / "out")
    names = [one["image"] for one in json.loads(task.path.read_text())]
    assert [(task.images / name).read_bytes() for name in names] == [b"one", b"two", b"three"]


def test_what_the_user_has_edited_is_not_built_over(layout: Layout, tmp_path: Path) -> None:
    source = layout("gqa")
    task = built("gqa", source, tmp_path / "out")
    assert built("gqa", source, tmp_path / "out", num_rows=2).num_rows == 2
    task.path.write_text(task.path.read_text() + " ")
    with pytest.raises(ValueError, match=r"gqa.json: is there already, and is no former output of this command"):
        built("gqa", source, tmp_path / "out")
    built("gqa", source, tmp_path / "out", overwrite=True)
    (tmp_path / "photos" / "pope").mkdir(parents=True)
    (tmp_path / "photos" / "pope" / "mine.jpg").touch()
    with pytest.raises(ValueError, match=r"pope: holds mine.jpg, and is no former output"):
        built("pope", layout("pope"), tmp_path / "photos")


def test_splits_that_unpack_side_by_side_have_their_own_images(layout: Layout, tmp_path: Path) -> None:
    source = layout("docvqa")
    for split in ("train", "val"):
        (source / split / "documents").mkdir(parents=True)
        (source / split / "documents" / "ffbf0023_4.png").write_text(split)
        content = (source / "spdocvqa_qas" / "val_v1.0_withQT.json").read_text()
        (source / split / f"{split}_v1.0.json").write_text(content)
    (source / "spdocvqa_qas" / "val_v1.0_withQT.json").unlink()
    for split in ("train", "val"):
        task = built("docvqa", source, tmp_path / "out", split=split)
        assert (task.images / "ffbf0023_4.png").read_text() == split


def test_mmbench_by_its_other_name(tmp_path: Path) -> None:
    mmbench_rows(tmp_path / "source", [row("1", b"image")], "mmbench_dev_en_20231003.tsv")
    mmbench_rows(tmp_path / "source", [row("2", b"image")], "mmbench_dev_cn_20231003.tsv")
    assert built("mmbench", tmp_path / "source", tmp_path / "out").num_rows == 1
    assert built("mmbench_cn", tmp_path / "source", tmp_path / "out").num_rows == 1


def test_questions_whose_options_tell_nothing_are_left_out_and_counted(layout: Layout, tmp_path: Path) -> None:
    rows = [row("1", b"image"), row("2", b"image", "cat cat"), row("3", b"image", "cat dog", "C")]
    mmbench_rows(tmp_path / "m", [*rows, row("4", b"image", "cat dog", "both")])
    task = built("mmbench", tmp_path / "m", tmp_path / "out")
    assert (task.num_rows, task.left_out) == (1, {"options that are alike": 1, "no option for its answer": 2})
    source = layout("ai2d") / "ai2d" / "questions"
    (source.parent / "ai2d_test_ids.csv").write_text("9\n")
    edit(source / "0.png.json", lambda one: one.update(questions={}))

    def options(*texts: object) -> Callable[[Any], None]:
        return lambda one: next(iter(one["questions"].values())).update(answerTexts=list(texts))

    edit(source / "1.png.json", options("sun", {}, "{}", "moon"))
    before = built("ai2d", source.parent, tmp_path / "ai2d")
    assert before.left_out == {
        "fewer than two options, or an empty one": 1, "about letters in the diagram, and there is no abc_images/": 1
    }  # fmt: skip
    manifest = json.loads((tmp_path / "ai2d" / "ai2d.manifest.json").read_text())
    assert manifest["left_out"] == before.left_out


def test_lines_of_mme_that_are_no_question_are_counted_and_a_mark_is_no_text(layout: Layout, tmp_path: Path) -> None:
    source = layout("mme") / "MME_Benchmark_release_version"
    (source / "count" / "0001.txt").write_text(
        "\ufeffIs it\x0bred?\tYes\r\nno tab here\n\tNo\nIs it blue?\tmaybe\n", encoding="utf-8"
    )
    tasks = {task.name: task for task in build(BENCHMARKS["mme"], source, tmp_path / "out", num_rows=None)}
    asked = "<image>\nIs it\x0bred?\nAnswer the question using a single word or phrase."
    assert questions(tasks["mme_count"]) == [asked]
    assert tasks["mme_count"].left_out == {"count: a line that is no question, tab, and Yes or No": 3}


ONE_LINE = [
    ("gqa", "val_balanced_questions.json", b"[1]", "gqa: the files in .* are of another form than known"),
    ("vizwiz", "Annotations/val.json", b'{"a": 1}', "vizwiz: the files in .* are of another form than known"),
    ("textvqa", "TextVQA_0.5.1_train.json", b"[]", "textvqa: the files in .* are of another form"),
    ("mmvet", "mm-vet/mm-vet.json", b'{"a": []}', "mmvet: the files in .* are of another form"),
    ("docvqa", "spdocvqa_qas/val_v1.0_withQT.json", b'{"data": [{"image": "a", "answers": []}]}', "docvqa: "),
    ("chartqa", "ChartQA Dataset/val/val_human.json", b"[" * 100_000, "val_human.json: not valid JSON"),
    ("gqa", "val_balanced_questions.json", '{"1": "caf\u00e9"}'.encode("latin-1"), "not valid JSON"),
    ("mmbench", "mmbench_dev_20230712.tsv", "index\tanswer\nn\u00e9\tA\n".encode("latin-1"), "is not UTF-8"),
    ("mmbench", "mmbench_dev_20230712.tsv", b"index\tanswer\timage\n1\tA\t!\n", "mmbench: no 'A' in"),
    ("mme", "MME_Benchmark_release_version/count/0001.txt", b"caf\xe9?\tYes\n", "0001.txt: byte 3 is not UTF-8"),
    ("ai2d", "ai2d/ai2d_test_ids.csv", b"\xff\xfe1\x00", "ai2d_test_ids.csv: byte 0 is not UTF-8"),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), ONE_LINE)
def test_files_of_another_form_are_one_line(
    name: str, file: str, content: bytes, message: str, layout: Layout, tmp_path: Path
) -> None:
    source = layout(name)
    assert (source / file).is_file()
    (source / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        built(name, source, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1


def test_tables_without_images_are_one_line(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="RealWorldQA's Parquet files need pyarrow (extra: table)")
    import pyarrow.parquet as parquet

    file = tmp_path / "source" / "test-0.parquet"
    file.parent.mkdir()
    for images in ([None], [{"bytes": None, "path": "a"}], [{"bytes": b"", "path": "a"}]):
        kind = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        parquet.write_table(pa.table({"image": kind, "question": ["q"], "answer": ["a"]}), file)
        with pytest.raises(ValueError, match="question 0: its image is empty; download the file again"):
            built("realworldqa", tmp_path / "source", tmp_path / "out")
    parquet.write_table(pa.table({"question": ["q"], "answer": ["a"]}), file)
    with pytest.raises(ValueError, match=r"test-0.parquet: has no column image"):
        built("realworldqa", tmp_path / "source", tmp_path / "out")
    file.write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(ValueError, match=r"test-0.parquet: cannot be read as Parquet"):
        built("realworldqa", tmp_path / "source", tmp_path / "out")
    mmbench_rows(tmp_path / "m", [[*row("1", b"")[:-1], "not base64!"]])
    with pytest.raises(ValueError, match="question 1: its image cannot be read"):
        built("mmbench", tmp_path / "m", tmp_path / "out")
