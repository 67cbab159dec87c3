"""The command line: words in, keyword arguments out; one line for what the user can mend."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from icons.cli import command_line as cli


def sample(
    train: Path,
    task: list[str] | None = None,
    chunk_rows: int = 4,
    strict: bool = False,
    trainer: dict[str, Any] | None = None,
) -> int:
    """Does something.

    Args:
        train: the training store.
    """
    if strict:
        raise ValueError("the store is not strict")
    return 0


def lean(store: Path, tasks: list[str] | None = None, strict: bool = False) -> None:
    """A command without a trainer."""


def test_a_repeated_option_becomes_a_list() -> None:
    options = cli.parse("lean", lean, ("store",), ["s.zarr", "--tasks", "a=1", "--tasks=b=2"])
    assert options == {"store": Path("s.zarr"), "tasks": ["a=1", "b=2"], "strict": False}


@pytest.mark.parametrize("words", [["--strict"], ["--strict", "true"], ["--strict=true"]])
def test_a_flag_needs_no_value(words: list[str]) -> None:
    assert cli.parse("lean", lean, ("store",), ["s.zarr", *words])["strict"] is True


def test_dashes_and_underscores_are_one() -> None:
    for option in ("--chunk-rows", "--chunk_rows"):
        assert cli.parse("sample", sample, (), ["--train", "t", option, "9"])["chunk_rows"] == 9


def test_trainer_holds_only_what_was_given() -> None:
    assert cli.parse("sample", sample, (), ["--train", "t"])["trainer"] == {}
    words = ["--train", "t", "--trainer.devices", "2", "--trainer.inference_mode", "true"]
    assert cli.parse("sample", sample, (), words)["trainer"] == {"devices": "2", "inference_mode": True}


def test_options_come_from_a_file_and_the_line_wins(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("train: t\nchunk_rows: 7\ntask: [a=1]\ntrainer:\n  devices: 3\n")
    options = cli.parse("sample", sample, (), ["--config", str(config), "--task", "b=2"])
    assert options["chunk_rows"] == 7
    assert options["task"] == ["b=2"]
    assert options["trainer"] == {"devices": 3}
    assert cli.parse("sample", sample, (), ["--config", str(config), "--chunk-rows", "8"])["chunk_rows"] == 8


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("icons.cli.select")
    module.select = sample  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "icons.cli.select", module)


def test_a_users_error_is_one_line(installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["select", "--train", "t", "--strict"]) == 1
    assert capsys.readouterr().err == "icons select: error: the store is not strict\n"


def test_traceback_on_demand(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICONS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="not strict"):
        cli.main(["select", "--train", "t", "--strict"])


def test_usage_errors_exit_2(installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["select"]) == 2
    assert "arguments are required: train" in capsys.readouterr().err
    assert cli.main(["selct"]) == 2
    assert "no command 'selct'; expected one of demo, warmup" in capsys.readouterr().err
    assert cli.main([]) == 2


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0


def test_a_recipe_of_the_package_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(Path(cli.__file__).parent.parent / "configs" / "warmup.yaml")
    assert cli.shipped_recipes(["--config", "warmup", "--out", "warmup"]) == ["--config", recipe, "--out", "warmup"]
    assert cli.shipped_recipes(["--config=warmup"]) == ["--config", recipe]
    (tmp_path / "warmup").write_text("")  # a file of that name comes first
    assert cli.shipped_recipes(["--config", "warmup"]) == ["--config", "warmup"]


def test_a_folder_of_a_recipes_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`icons warmup --config warmup --out warmup`, run again, has a folder of that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "warmup").mkdir()
    assert cli.shipped_recipes(["--config", "warmup"])[1].endswith("configs/warmup.yaml")
    (tmp_path / "select").write_text("fraction: 0.3\n")
    assert cli.shipped_recipes(["--config", "select"])[1] == "select"
