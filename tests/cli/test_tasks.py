"""`icons tasks`: the list says what to download; build writes the file; wrong use ends with one line."""

import json
from pathlib import Path

import pytest
from PIL import Image

from icons.cli import main
from icons.datamodules.benchmarks import BENCHMARKS
from icons.datamodules.benchmarks.yes_no import MME_SUBTASKS


@pytest.fixture
def gqa(tmp_path: Path) -> Path:
    folder = tmp_path / "gqa_files"
    (folder / "images").mkdir(parents=True)
    rows = {str(i): {"imageId": "n1", "question": f"Side {i}?", "answer": "left"} for i in range(4)}
    for split in ("val", "testdev"):
        (folder / f"{split}_balanced_questions.json").write_text(json.dumps(rows))
    Image.new("RGB", (4, 4)).save(folder / "images" / "n1.jpg")
    return folder


def test_list_names_every_benchmark_with_its_files_and_their_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "list"]) == 0
    shown = capsys.readouterr().out
    for name, benchmark in BENCHMARKS.items():
        assert name in shown
        for path, url in benchmark.downloads:
            assert path in shown and url in shown
    assert main(["tasks", "list", "gqa"]) == 0
    assert "vqav2" not in capsys.readouterr().out


def test_build_writes_the_sample(gqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tasks"
    line = ["tasks", "build", "gqa", "--source", str(gqa), "--out", str(out), "--num-rows", "3"]
    assert main(line) == 0
    assert len(json.loads((out / "gqa.json").read_text())) == 3
    assert (out / "gqa" / "n1.jpg").exists()
    assert "leave the ids" not in capsys.readouterr().out
    assert main([*line, "--split", "testdev"]) == 0
    assert "leave the ids" in capsys.readouterr().out


def test_the_subtasks_of_mme_are_named_as_a_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for subtask in MME_SUBTASKS:
        folder = tmp_path / "MME_Benchmark_release_version" / subtask
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "1.png")
        (folder / "1.txt").write_text("Is it red? Please answer yes or no.\tNo\n")
    assert main(["tasks", "build", "mme", "--source", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    group = ",".join(f"mme_{subtask}" for subtask in MME_SUBTASKS)
    assert f"--group mme={group}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "gqq", "--source", ".", "--out", "o"], "no benchmark 'gqq'; known: vqav2, gqa"),
        (["build", "gqa"], "build takes the benchmark's name, --source DIR and --out DIR"),
        (["build", "gqa", "--source", "nowhere", "--out", "o"], "--source nowhere: no such folder"),
    ],
)
def test_wrong_use_ends_with_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", *words]) == 1
    assert message in capsys.readouterr().err
