"""`icons inspect` shows what is learned, where images are, and why rows fail, with and without colours."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from icons.cli import main

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]


@pytest.fixture
def data(original: Path, tmp_path: Path) -> list[str]:
    """Four rows, two of which fail, and the options that name them and the model."""
    image = next(str(file.name) for file in original.iterdir() if file.suffix in (".png", ".jpg"))
    records: list[Any] = [
        {"id": "a", "image": image, "conversations": TURNS},
        {"id": "b", "image": "none.png", "conversations": TURNS},
        {"id": "c", "conversations": [{"from": "human", "value": "[bold]Hi[/bold]"}, {"from": "gpt", "value": "you"}]},
        {"id": "d", "conversations": [{"from": "human", "value": "Hi"}]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    model = ["--model", str(original / "vicuna-tiny"), "--vision-tower", str(original / "clip")]
    model += ["--mm-projector", str(original / "mm_projector.bin")]
    return [str(tmp_path / "data.json"), "--images", str(original), *model]


def test_a_row_is_shown_with_what_is_learned_of_it(data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *data, "--row", "0", "--row", "2"]) == 0
    said = capsys.readouterr().out
    assert "4 rows" in said and "template v1" in said
    assert "row 0 (id a):" in said and "pixel_values [1, 3, 56, 56]" in said
    assert "[image x 16]" in said
    assert "ASSISTANT:" in said and said.count("\N{LEFT DOUBLE ANGLE BRACKET}") == 2
    learned = said.partition("\N{LEFT DOUBLE ANGLE BRACKET}")[2].partition("\N{RIGHT DOUBLE ANGLE BRACKET}")[0]
    assert learned.endswith("</s>") and "USER" not in learned


def test_failures_are_counted_by_kind_with_examples(data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *data, "--samples", "4"]) == 0
    said = capsys.readouterr().out
    assert "row 1 (id b): FAILED image_missing" in said
    assert "of 4 rows tried, 2 are good" in said
    assert "image_missing: 1 row\n" in said and "    row 1: " in said


def test_colours_stand_in_place_of_brackets(
    data: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icons.cli.inspect.console", Console(force_terminal=True, color_system="standard", width=200))
    assert main(["inspect", *data, "--row", "0"]) == 0
    said = capsys.readouterr().out
    assert "\x1b[1;32m" in said and "\x1b[1;35m[image x 16]" in said
    assert "\N{LEFT DOUBLE ANGLE BRACKET}" not in said


def test_no_good_row_is_an_error(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{"id": "b", "image": "none.png", "conversations": TURNS}]))
    assert main(["inspect", *data]) == 1
    assert "of 1 row tried, 0 are good" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (["--row", "4"], "--row 4: .* has 4 rows; expected 0 to 3"),
        (["--samples", "0"], "--samples 0: expected 1 or more"),
        (["--scan", "0"], "--scan 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_shown_is_said(
    extra: list[str], text: str, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *data, *extra]) == 1
    assert re.search(text, capsys.readouterr().err)
