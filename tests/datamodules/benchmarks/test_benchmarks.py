"""Every benchmark's layout becomes LLaVA JSON: prompts, answers, images, sample, errors."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from icons.datamodules.benchmarks import BENCHMARKS, build
from icons.datamodules.benchmarks.yes_no import MME_SUBTASKS

Layout = Callable[[str], Path]
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def records(path: Path) -> list[dict[str, object]]:
    return json.loads(path.read_text(encoding="utf-8"))


def turns(folder: Path, name: str, out: Path, **options: object) -> list[tuple[str, str]]:
    """(prompt, answer) of each record written."""
    (task,) = build(BENCHMARKS[name], folder, out, **({"num_rows": None} | options))
    return [(r["conversations"][0]["value"], r["conversations"][1]["value"]) for r in records(task.path)]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_record_has_id_image_and_a_question_with_its_answer(name: str, layout: Layout, tmp_path: Path) -> None:
    built = build(BENCHMARKS[name], layout(name), tmp_path / "out", num_rows=None)
    for task in built:
        rows = records(task.path)
        assert len(rows) == task.num_rows == task.num_questions > 0
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert set(row) == {"id", "image", "conversations"}
            human, gpt = row["conversations"]
            assert human["from"] == "human" and human["value"].startswith("<image>\n")
            assert gpt["from"] == "gpt" and gpt["value"]
            with Image.open(task.images / row["image"]) as image:
                assert image.size == (4, 4)
        manifest = json.loads(task.path.with_suffix(".manifest.json").read_text())
        assert manifest["ids"] == [row["id"] for row in rows]


def test_vqav2_takes_the_majority_of_the_annotators(layout: Layout, tmp_path: Path) -> None:
    assert turns(layout("vqav2"), "vqav2", tmp_path) == [
        (f"<image>\nIs it red?{SHORT}", "Yes"),
        (f"<image>\nWhat colour?{SHORT}", "Red"),
        (f"<image>\nHow many?{SHORT}", "2"),
    ]


def test_gqa_takes_a_part_that_is_not_evaluated_unless_asked(layout: Layout, tmp_path: Path) -> None:
    folder = layout("gqa")
    assert turns(folder, "gqa", tmp_path)[0] == (f"<image>\nSide 0?{SHORT}", "Left")
    assert records(tmp_path / "gqa.json")[0]["id"] == "val0"
    assert not json.loads((tmp_path / "gqa.manifest.json").read_text())["evaluated"]
    turns(folder, "gqa", tmp_path, split="testdev")
    assert records(tmp_path / "gqa.json")[0]["id"] == "testdev0"
    assert json.loads((tmp_path / "gqa.manifest.json").read_text())["evaluated"]


def test_vizwiz_says_when_a_question_is_unanswerable(layout: Layout, tmp_path: Path) -> None:
    hint = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert turns(layout("vizwiz"), "vizwiz", tmp_path)[:2] == [
        (f"<image>\nWhat is this?{hint}{SHORT}", "Unanswerable"),
        (f"<image>\nWhat is this?{hint}{SHORT}", "Soup"),
    ]


def test_textvqa_tells_the_text_that_was_read(layout: Layout, tmp_path: Path) -> None:
    prompt = f"<image>\nWhat brand?\nReference OCR token: dakota, DIGITAL{SHORT}"
    assert turns(layout("textvqa"), "textvqa", tmp_path)[0] == (prompt, "Dakota")


def test_scienceqa_takes_questions_with_an_image_in_the_form_cqm(layout: Layout, tmp_path: Path) -> None:
    assert turns(layout("scienceqa"), "scienceqa", tmp_path) == [
        (f"<image>\nContext: N/A\nQuestion: Which?\nOptions: (A) west (B) east{LETTER}", "B"),
        (f"<image>\nContext: A map.\nQuestion: Where? \nOptions: (A) x (B) y (C) z{LETTER}", "C"),
    ]


def test_mmbench_puts_the_hint_first_and_leaves_empty_options_out(layout: Layout, tmp_path: Path) -> None:
    assert turns(layout("mmbench"), "mmbench", tmp_path) == [
        (f"<image>\nLook\nclosely.\nWhich one?\nA. cat\nB. dog{LETTER}", "B"),
        (f"<image>\nHow many?\nA. 1\nB. 2\nC. 3\nD. 4{LETTER}", "D"),
        (f"<image>\nHow many?\nA. 2\nB. 3\nC. 4\nD. 1{LETTER}", "C"),
    ]


def test_mmbench_ends_the_options_at_what_pandas_calls_empty(layout: Layout, tmp_path: Path) -> None:
    folder = layout("mmbench")
    table = folder / "mmbench_dev_20230712.tsv"
    table.write_text(table.read_text().replace("cat\tdog\t\tnan\t", "cat\tdog\tN/A\tbird\t"))
    assert turns(folder, "mmbench", tmp_path)[0][0].endswith(f"\nA. cat\nB. dog{LETTER}")


def test_mmbench_in_chinese_asks_for_the_letter_in_chinese(layout: Layout, tmp_path: Path) -> None:
    assert turns(layout("mmbench_cn"), "mmbench_cn", tmp_path)[1][0].endswith("\nD. 4\n请直接回答选项字母。")


def test_ai2d_leaves_out_test_diagrams_and_questions_about_letters_that_are_not_drawn(
    layout: Layout, tmp_path: Path
) -> None:
    folder = layout("ai2d")
    prompt = f"<image>\nWhat is 1?\nA. sun\nB. moon\nC. both\nD. none{LETTER}"
    assert turns(folder, "ai2d", tmp_path)[1] == (prompt, "B")
    assert [row["id"] for row in records(tmp_path / "ai2d.json")] == ["0.png-0", "1.png-0"]
    lettered = folder / "ai2d" / "abc_images"
    lettered.mkdir()
    Image.new("RGB", (4, 4)).save(lettered / "2.png")
    assert turns(folder, "ai2d", tmp_path)[2][1] == "C"
    assert records(tmp_path / "ai2d.json")[2]["image"] == "abc_images/2.png"
    assert len(turns(folder, "ai2d", tmp_path, split="test")) == 1


def test_pope_takes_all_three_parts(layout: Layout, tmp_path: Path) -> None:
    rows = turns(layout("pope"), "pope", tmp_path)
    assert len(rows) == 6
    assert rows[:2] == [(f"<image>\nIs there a dog?{SHORT}", "Yes"), (f"<image>\nIs there a dog?{SHORT}", "No")]


def test_mme_becomes_one_file_for_each_of_the_thirteen_subtasks(layout: Layout, tmp_path: Path) -> None:
    built = build(BENCHMARKS["mme"], layout("mme"), tmp_path / "out", num_rows=None)
    assert [task.name for task in built] == [f"mme_{subtask}" for subtask in MME_SUBTASKS]
    assert len(built) == 13
    for task in built:
        first, second = records(task.path)
        assert first["conversations"][0]["value"] == f"<image>\nIs it red?{SHORT}"
        assert first["conversations"][1]["value"] == "Yes"
        assert second["conversations"][0]["value"] == f"<image>\nIs it\tblue?{SHORT}"
        assert second["conversations"][1]["value"] == "No"
    one_each = build(BENCHMARKS["mme"], tmp_path / "source" / "mme", tmp_path / "out", num_rows=13)
    assert {task.num_rows for task in one_each} == {1}


def test_open_questions_are_asked_as_they_are(layout: Layout, tmp_path: Path) -> None:
    assert turns(layout("llava_bench"), "llava_bench", tmp_path)[0] == ("<image>\nTell 0.", "Told 0.")
    assert turns(layout("mmvet"), "mmvet", tmp_path) == [
        ("<image>\nWhat is x?", "-1, -5"),
        ("<image>\nWho?", "Ann"),
    ]
    assert turns(layout("realworldqa"), "realworldqa", tmp_path)[0] == ("<image>\n0?\nPlease answer.", "A")


def test_realworldqa_reads_its_parquet_files(layout: Layout, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="RealWorldQA's Parquet files need pyarrow (extra: table)")
    import pyarrow.parquet as parquet

    expected = turns(layout("realworldqa"), "realworldqa", tmp_path / "a")
    source = tmp_path / "source" / "realworldqa"
    rows = json.loads((source / "annotations.json").read_text())
    images = [{"bytes": (source / "images" / row["image"]).read_bytes(), "path": None} for row in rows]
    columns = {"image": images, "question": [r["question"] for r in rows], "answer": [r["answer"] for r in rows]}
    tables = tmp_path / "tables"
    (tables / "data").mkdir(parents=True)
    parquet.write_table(pa.table(columns), tables / "data" / "test-00000-of-00001.parquet", row_group_size=2)
    assert turns(tables, "realworldqa", tmp_path / "b") == expected
    for name in ("0.webp", "1.webp", "2.webp"):
        assert (tmp_path / "b/realworldqa" / name).read_bytes() == (tmp_path / "a/realworldqa" / name).read_bytes()


def test_documents_take_the_first_accepted_answer(layout: Layout, tmp_path: Path) -> None:
    assert turns(layout("docvqa"), "docvqa", tmp_path) == [(f"<image>\nWhat day?{SHORT}", "May 1")]
    assert turns(layout("infovqa"), "infovqa", tmp_path) == [(f"<image>\nWhich network?{SHORT}", "pinterest")]
    assert turns(layout("chartqa"), "chartqa", tmp_path) == [
        ("<image>\nHow high?\nAnswer the question with a single word.", "0.57"),
        ("<image>\nWhich year?\nAnswer the question with a single word.", "2014"),
    ]


def test_a_sample_is_seeded_keeps_the_order_and_copies_only_its_images(layout: Layout, tmp_path: Path) -> None:
    folder = layout("vqav2")
    for out, seed in (("a", 0), ("b", 0), ("c", 1), ("c2", 2), ("c3", 3)):
        build(BENCHMARKS["vqav2"], folder, tmp_path / out, num_rows=2, seed=seed)
    ids = [row["id"] for row in records(tmp_path / "a" / "vqav2.json")]
    assert ids == sorted(ids) and len(ids) == 2
    assert (tmp_path / "a" / "vqav2.json").read_bytes() == (tmp_path / "b" / "vqav2.json").read_bytes()
    samples = {(tmp_path / out / "vqav2.json").read_bytes() for out in ("a", "c", "c2", "c3")}
    assert len(samples) > 1
    assert len(list((tmp_path / "a" / "vqav2").glob("*.jpg"))) == 2


def test_a_missing_file_is_named_with_where_it_is_published(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gqa: no val_balanced_questions.json in .*questions1.2.zip"):
        build(BENCHMARKS["gqa"], tmp_path, tmp_path / "out", num_rows=1)


def test_a_missing_image_is_named(layout: Layout, tmp_path: Path) -> None:
    folder = layout("gqa")
    (folder / "images" / "n1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"question val1: its image .*n1.jpg is not there"):
        build(BENCHMARKS["gqa"], folder, tmp_path / "out", num_rows=None)


def test_missing_parts_of_mme_are_named(layout: Layout, tmp_path: Path) -> None:
    root = layout("mme") / "MME_Benchmark_release_version"
    (root / "OCR" / "0001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image 0001.jpg or .png in .*OCR for the questions in 0001.txt"):
        build(BENCHMARKS["mme"], root, tmp_path / "out", num_rows=None)
    (root / "OCR").rename(root / "ocr")
    with pytest.raises(FileNotFoundError, match="no OCR/ in"):
        build(BENCHMARKS["mme"], root, tmp_path / "out", num_rows=None)


def test_wrong_use_and_files_of_another_form_are_refused(layout: Layout, tmp_path: Path) -> None:
    folder = layout("gqa")
    with pytest.raises(ValueError, match="gqa: no split 'test' with public answers; has val, train, testdev"):
        build(BENCHMARKS["gqa"], folder, tmp_path / "out", num_rows=None, split="test")
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        build(BENCHMARKS["gqa"], folder, tmp_path / "out", num_rows=0)
    questions = folder / "val_balanced_questions.json"
    questions.write_text("{}")
    with pytest.raises(ValueError, match="gqa: no question of split 'val' in"):
        build(BENCHMARKS["gqa"], folder, tmp_path / "out", num_rows=None)
    questions.write_text('{"1": {"image": 3}}')
    with pytest.raises(ValueError, match=r"gqa: no 'imageId' in .* another version"):
        build(BENCHMARKS["gqa"], folder, tmp_path / "out", num_rows=None)
    questions.write_text('{"1": ')
    with pytest.raises(ValueError, match=r"val_balanced_questions.json: not valid JSON .* download it again"):
        build(BENCHMARKS["gqa"], folder, tmp_path / "out", num_rows=None)


def test_a_broken_line_and_a_question_without_answers_are_named(layout: Layout, tmp_path: Path) -> None:
    folder = layout("pope")
    with (folder / "coco" / "coco_pope_popular.json").open("a") as lines:
        lines.write('\n{"question_id": \n')
    with pytest.raises(ValueError, match=r"coco_pope_popular.json, line 4: not valid JSON"):
        build(BENCHMARKS["pope"], folder, tmp_path / "out", num_rows=None)
    folder = layout("vizwiz")
    questions = json.loads((folder / "Annotations" / "val.json").read_text())
    questions[0]["answers"] = []
    (folder / "Annotations" / "val.json").write_text(json.dumps(questions))
    with pytest.raises(ValueError, match="a question has no answers"):
        build(BENCHMARKS["vizwiz"], folder, tmp_path / "out", num_rows=None)


def test_parquet_files_without_their_reader_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test-00000-of-00001.parquet").touch()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        build(BENCHMARKS["realworldqa"], tmp_path, tmp_path / "out", num_rows=None)
