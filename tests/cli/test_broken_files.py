"""Data and task files that are broken as a whole: one clear line each, and nothing is written."""

from pathlib import Path

import pytest

from icons.cli import command_line as cli

DATA = Path(__file__).parents[1] / "data" / "original_llava"
pytestmark = pytest.mark.filterwarnings("ignore")
MODEL = ["--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip", "--mm-projector", DATA / "mm_projector.bin"]
GRADIENTS = [*MODEL, "--adapter", DATA / "llava-tiny-lora", "--preconditioner", "none", "--dim", 64]
WHOLE = (DATA / "data.json").read_text()


def said(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command that fails says on stderr, its line breaks taken out."""
    assert cli.main([str(word) for word in words]) == 1
    error = capfd.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    return error


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "is empty"),
        ("   \n \n", "holds no record"),
        ("[]", "holds no record"),
        (WHOLE[: len(WHOLE) // 2], "the file ends"),
        ("<html>not found</html>", "is a web page or XML"),
        ('"a text"', "expected"),
    ],
    ids=["empty", "blank", "no record", "cut short", "a web page", "a text"],
)
def test_a_data_file_that_is_broken_as_a_whole(
    content: str, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data.json"
    file.write_text(content)
    out = tmp_path / "a.zarr"
    error = said(capfd, "gradients", *GRADIENTS, "--data", file, "--images", DATA, "--out", out)
    assert "data.json" in error and text in error
    assert not out.exists()


@pytest.mark.parametrize("word", ["gqa=nowhere.json", "gqa=nowhere.json:images", "nowhere.json", "gqa="])
def test_a_task_file_that_is_not_there(word: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = ["--data", DATA / "data.json", "--images", DATA, "--task", word]
    error = said(capfd, "warmup", *MODEL, *data, "--out", tmp_path / "warmup")
    assert "--task" in error and ("no file nowhere.json" in error or "expected NAME=" in error)
    error = said(capfd, "score", "--checkpoint", tmp_path / "w", *data, "--out", tmp_path / "s.zarr")
    assert "--task" in error and "expected NAME=" in error
    assert not (tmp_path / "warmup").exists() and not (tmp_path / "s.zarr").exists()
