"""`icons export` through its command line."""

import re
from pathlib import Path

import pytest

from icons.cli import main
from icons.models.folder import ModelFolder

DATA = Path(__file__).parents[1] / "data" / "original_llava"
PARTS = [
    "--model", str(DATA / "vicuna-tiny"), "--vision-tower", str(DATA / "clip"),
    "--mm-projector", str(DATA / "mm_projector.bin"), "--adapter", str(DATA / "llava-tiny-lora"),
]  # fmt: skip


def test_parts_to_both_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *PARTS, "--out", str(tmp_path / "hf")]) == 0
    assert ModelFolder.open(tmp_path / "hf").layout == "huggingface"
    assert main(["export", *PARTS, "--format", "llava", "--out", str(tmp_path / "merged")]) == 0
    assert ModelFolder.open(tmp_path / "merged").layout == "original"
    assert "rename merged to llava-..." in capsys.readouterr().out


def test_refuses_unclear_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    for words, text in (
        (out, "got neither of --checkpoint and --model"),
        ([*PARTS, "--checkpoint", str(tmp_path), *out], "got both of --checkpoint and --model"),
        (["--checkpoint", str(tmp_path), "--adapter", "x", *out], "--adapter x: the warm-up folder .* names its own"),
        (["--checkpoint", str(tmp_path), *out], "no finished warm-up here"),
    ):
        assert main(["export", *words]) == 1
        assert re.search(text, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
