"""`icons report`: one HTML file from what `icons select` left, pictures on demand, one line for what is wrong."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icons.cli import main
from icons.cli.report import open_image
from icons.datamodules.conversation import ImageRef
from icons.datamodules.images import ImageSource
from icons.store import ScoreStore

NUM_ROWS = 50


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl with a line that is not JSON, images/, scores.zarr, and selected.jsonl by `icons select`."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "images" / "coco").mkdir(parents=True)
    lines = []
    for row in range(NUM_ROWS):
        said = [{"from": "human", "value": f"<image>\nWhat is {row}?"}, {"from": "gpt", "value": "<u>red</u>"}]
        lines.append(json.dumps({"id": row, "image": f"coco/{row}.jpg", "conversations": said}))
        Image.new("RGB", (20, 10), (row, 0, 0)).save(folder / "images" / "coco" / f"{row}.jpg")
    lines[5] = "{ no JSON"
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    random = np.random.default_rng(0)
    influence = random.normal(size=(NUM_ROWS, 2)).astype(np.float32)
    influence[5] = np.nan
    status = np.ones(NUM_ROWS, np.uint8)
    status[5] = 2
    store = ScoreStore.create(folder / "scores.zarr", num_rows=NUM_ROWS, tasks=["gqa", "pope"], manifest={"dim": 512})
    store.write_unit(0, influence, np.full_like(influence, 0.05), status)
    assert main(["select", *words(folder), "--out", str(folder / "selected.jsonl")]) == 0
    return folder


def words(run: Path) -> list[str]:
    return ["--scores", str(run / "scores.zarr"), "--data", str(run / "train.jsonl")]


def report(run: Path, out: Path, *further: str) -> int:
    line = ["report", *words(run), "--selection", str(run / "selected.jsonl"), "--out", str(out)]
    return main([*line, "--images", str(run / "images"), *further])


def test_the_page_is_one_file_and_the_same_each_time(run: Path, tmp_path: Path) -> None:
    assert report(run, tmp_path / "deep" / "report.html") == 0
    page = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "1 row failed and cannot be selected: 1 bad record." in page
    assert page.count("data:image/jpeg;base64,") == 3 * 2 * 4  # two tasks and the consensus, two ends of each
    assert "&lt;u&gt;red&lt;/u&gt;" in page and "<u>" not in page
    assert "coco" in page and "certain at 95 %" in page
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]
    assert report(run, tmp_path / "again.html") == 0
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_figures_are_written_beside_it_on_demand(run: Path, tmp_path: Path) -> None:
    assert report(run, tmp_path / "report.html", "--png", "--title", "My run", "--rows-shown", "1") == 0
    written = sorted(path.name for path in (tmp_path / "report_figures").iterdir())
    assert "votes.png" in written and "scores-gqa.png" in written and "border-pope.png" in written
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>My run</title>" in page
    assert page.count("data:image/jpeg;base64,") == 3 * 2


def test_without_an_image_folder_the_texts_are_shown_alone(run: Path, tmp_path: Path) -> None:
    line = ["report", *words(run), "--selection", str(run / "selected.jsonl"), "--out", str(tmp_path / "report.html")]
    assert main(line) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image/jpeg" not in page and "image folder" not in page and "What is" in page


def test_several_source_fields_give_several_compositions(run: Path, tmp_path: Path) -> None:
    assert report(run, tmp_path / "report.html", "--source-field", "id", "--source-field", "image") == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Composition by id" in page and "Composition by image" in page


def test_an_image_that_is_missing_or_outside_of_the_folder_is_told_from_a_broken_one(run: Path, tmp_path: Path) -> None:
    source = ImageSource(run / "images")
    for name in ("../train.jsonl", "/etc/hostname", "coco/none.jpg"):
        with pytest.raises(FileNotFoundError, match="image"):
            open_image(source, ImageRef(name))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken.jpg"):
        open_image(ImageSource(tmp_path), ImageRef("broken.jpg"))


def test_images_may_lie_in_an_archive(run: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in (run / "images" / "coco").iterdir():
            archive.write(path, f"coco/{path.name}")
    assert report(run, tmp_path / "folder.html") == 0
    assert report(run, tmp_path / "archive.html", "--images", str(tmp_path / "images.zip")) == 0
    assert (tmp_path / "archive.html").read_text() == (tmp_path / "folder.html").read_text()


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["--rows-shown", "0"], "--rows-shown 0: expected at least 1"),
        (["--images", "nowhere"], "nowhere: no such image folder"),
        (["--comparison", "nowhere.json"], "nowhere.json: no such file"),
        (["--selection", "nowhere.json"], "nowhere.json"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    run: Path, tmp_path: Path, further: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(run, tmp_path / "report.html", *further) == 1
    error = capsys.readouterr().err
    assert error.startswith("icons report: error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_other_data_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (run / "train.jsonl").read_text(encoding="utf-8")
    for name, text, message in (
        ("short.jsonl", '{"id": 1}\n', "short.jsonl: has 1 records, the selection was made from"),
        ("changed.jsonl", lines.replace("red", "tan"), "changed.jsonl: has the fingerprint"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert report(run, tmp_path / "report.html", "--data", str(tmp_path / name)) == 1
        assert message in capsys.readouterr().err


def test_a_report_loads_no_model_library() -> None:
    code = (
        "import sys, icons.cli.report; print([name for name in ('transformers', 'lightning') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
