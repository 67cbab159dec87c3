"""Text from files, at the terminal, in tables and in options: shown as it is, obeyed never."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from icons.cli import main
from icons.consensus.selection_file import write_table
from icons.store import GradientStore
from icons.terminal import Console, legible

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{former}'] * 10)}]\n" for former, name in zip("abcdef", "bcdefg", strict=True)
)


def test_a_manifest_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = {"note": "[old] [/old] [link=http://x]y[/link]", "title": "\x1b]0;owned\x07\x1b[31m", "[/a]": "\x9b31m"}
    GradientStore.create(tmp_path / "s.zarr", num_rows=2, dim=2, manifest=hostile)
    assert main(["status", str(tmp_path / "s.zarr")]) == 0
    said = capsys.readouterr().out
    assert hostile["note"] in said and "[/a]" in said and "\\x9b31m" in said
    assert r"\x1b]0;owned\x07\x1b[31m" in said and "\x1b" not in said and "\x9b" not in said


def test_an_error_shows_a_name_and_does_not_obey_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", f"{tmp_path}/\x1b[2Jgone.zarr"]) == 1
    said = capsys.readouterr().err
    assert r"\x1b[2Jgone.zarr" in said and "\x1b" not in said


def test_the_console_writes_control_characters_out(capsys: pytest.CaptureFixture[str]) -> None:
    Console().print("a\x1b[2Jb\u202ec\td\ne", markup=False)
    assert capsys.readouterr().out == "a\\x1b[2Jb\\u202ec        d\ne\n"
    assert legible("plain\ttext\n") == "plain\ttext\n"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1"])
def test_a_cell_is_no_formula(text: str, tmp_path: Path) -> None:
    columns = {"id": np.array([text, "r1"], dtype=object), "score": np.array([-0.5, 2.0])}
    write_table(tmp_path / "t.csv", {**columns, f"{text}": np.array([1, 2])})
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        head, first, second = csv.reader(file)
    assert (first[0], first[1], second[0], head[2]) == (f"'{text}", "-0.5", "r1", f"'{text}")


@pytest.mark.parametrize(
    ("content", "said"),
    [(BOMB + "scores: [*g, *g]\n", "entries once its aliases"), ("scores: &a [*a]\n", "entries once its aliases"),
     ("scores: " + "[" * 5_000, "nested too deep"), ("data: !!python/object/apply:os.getcwd []\n", "config")],
    ids=["aliases of aliases", "an alias of itself", "nested", "an object"],
)  # fmt: skip
def test_a_yaml_file_cannot_grow(content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert main(["select", "--config", str(tmp_path / "run.yaml"), "--data", "d", "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error) < 2_000


def test_aliases_may_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = json.dumps(str(tmp_path / "none"))
    (tmp_path / "run.yaml").write_text(f"scores: &a {lines}\ndata: *a\nout: {json.dumps(str(tmp_path / 'out'))}\n")
    assert main(["select", "--config", str(tmp_path / "run.yaml")]) == 1
    assert "none" in capsys.readouterr().err
