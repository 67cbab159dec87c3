"""From words and YAML files to an options object, and the help."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import pytest

from icons.cli import parser
from icons.cli.command_line import COMMANDS, options_of
from icons.cli.options.groups import TrainerOptions
from icons.cli.parser import parse
from icons.cli.tables import PACKAGE, TABLES
from icons.cli.words import shipped_recipes
from icons.consensus.rules import RULES
from icons.projection import PROJECTORS


@dataclass(frozen=True, kw_only=True)
class CountOptions:
    """counting"""

    chunk_rows: int = 4
    """how many"""


@dataclass(frozen=True, kw_only=True)
class LeanOptions(CountOptions):
    """Does something.

    $ icons lean STORE
    """

    positional: ClassVar = ("store",)
    store: Path
    """where it lies"""
    tasks: list[str] | None = None
    """what for"""
    strict: bool = False
    """not to be lenient"""
    kind: str = field(default="count_sketch", metadata={"choices": "projectors"})


@dataclass(frozen=True, kw_only=True)
class SampleOptions(CountOptions, TrainerOptions):
    """Does something with a Trainer."""

    train: Path
    task: list[str] | None = None


def lean(*words: str) -> LeanOptions:
    return parse("lean", LeanOptions, ["s.zarr", *words])


def test_a_repeated_option_becomes_a_list() -> None:
    assert lean("--tasks", "a=1", "--tasks=b=2") == LeanOptions(store=Path("s.zarr"), tasks=["a=1", "b=2"])


def test_an_unknown_option_is_named_as_it_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lean("--no-such-thing", "3")
    assert "--no-such-thing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--chunk-rows", "x"], "error: --chunk-rows x: expected a whole number"),
        (["--kind", "x"], "error: --kind x: expected one of count_sketch, "),
        (["--config", "{}/bad.yaml"], "error: Problems parsing config: "),
    ],
)
def test_a_wrong_value_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (tmp_path / "bad.yaml").write_text("{not yaml")
    with pytest.raises(SystemExit):
        lean(*(word.format(tmp_path) for word in words))
    assert capsys.readouterr().err.splitlines()[-1].startswith(said)


def test_what_is_missing_is_named_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("sample", SampleOptions, [])
    assert "error: missing: --train" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("lean", LeanOptions, [])
    assert "error: missing: STORE" in capsys.readouterr().err


def test_yaml_takes_dashes(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("chunk-rows: 9\n")
    assert lean("--config", str(tmp_path / "a.yaml")).chunk_rows == 9


def test_a_value_of_a_list_that_looks_like_json_is_a_value() -> None:
    assert lean("--tasks", "[a=b").tasks == ["[a=b"]
    assert lean("--tasks", '["a", "b"]', "--tasks", "c").tasks == ["a", "b", "c"]


@pytest.mark.parametrize("words", [["--strict"], ["--strict", "true"], ["--strict=true"], ["--strict", "yes"]])
def test_a_flag_needs_no_value(words: list[str]) -> None:
    assert lean(*words).strict is True
    assert parse("lean", LeanOptions, [*words, "s.zarr"]).store == Path("s.zarr")


@pytest.mark.parametrize("option", ["--chunk-rows", "--chunk_rows"])
def test_dashes_and_underscores_are_one(option: str) -> None:
    assert lean(option, "9").chunk_rows == lean(f"{option}=9").chunk_rows == 9


def test_trainer_holds_only_what_was_given() -> None:
    assert parse("sample", SampleOptions, ["--train", "t"]).trainer == {}
    words = ["--train", "t", "--trainer.devices", "2", "--trainer.inference_mode", "true"]
    assert parse("sample", SampleOptions, words).trainer == {"devices": "2", "inference_mode": True}


@pytest.mark.parametrize("key", ["chunk_rows", "chunk-rows"])
def test_options_come_from_a_file_and_the_line_wins(tmp_path: Path, key: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"train: t\n{key}: 7\ntask: [a=1]\ntrainer:\n  devices: 3\n")
    options = parse("sample", SampleOptions, ["--config", str(config), "--task", "b=2"])
    assert options == SampleOptions(train=Path("t"), chunk_rows=7, task=["b=2"], trainer={"devices": 3})
    assert parse("sample", SampleOptions, ["--config", str(config), "--chunk-rows", "8"]).chunk_rows == 8


def test_a_key_that_is_no_option_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("chunk-row: 7\n")
    with pytest.raises(SystemExit):
        lean("--config", str(tmp_path / "run.yaml"))
    assert "chunk_row" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # no guessing what a part of a name stands for
        lean("--chunk", "7")


def test_a_printed_configuration_is_one_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lean("--strict", "--tasks", "a", "--print-config")
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert parse("lean", LeanOptions, ["--config", str(tmp_path / "run.yaml")]) == lean("--strict", "--tasks", "a")


def test_choices_are_the_keys_of_their_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(TABLES["projectors"]()) == list(PROJECTORS) == [kind.kind for kind in PROJECTORS.values()]
    assert TABLES["rules"]() == {name: rule.does for name, rule in RULES.items()}
    options = {name: ", ".join(f"{key}={value}" for key, value in rule.options.items()) for name, rule in RULES.items()}
    assert TABLES["rule options"]() == {name: said for name, said in options.items() if said}
    with pytest.raises(SystemExit):
        lean("--kind", "none")
    assert "rademacher" in capsys.readouterr().err


def test_the_help_has_headings_choices_defaults_and_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lean("--help")
    text = capsys.readouterr().out
    assert "\n$ icons lean STORE\n" in text and "usage: icons lean STORE [options]" in text
    assert "\nlean:\n  --tasks TEXT" in text and "\ncounting:\n  --chunk-rows N        how many (default: 4)\n" in text
    assert "--kind {count_sketch,rademacher,gaussian}" in text
    assert "\n  --strict              not to be lenient\n" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_and_every_command_a_text(name: str) -> None:
    options = options_of(name)
    described = parser.documented(options)
    placed = [field.name for kept in parser.headed(options).values() for field in kept]
    assert len(placed) == len(set(placed)) and set(placed) == {field.name for field in fields(options)}
    assert [option for option in placed if len(described.get(option, "")) < 10] == []
    assert f"$ icons {name}" in (options.__doc__ or "")


@pytest.mark.slow
def test_the_trainers_flags_are_shown_with_our_defaults() -> None:
    text = parser.trainer_help("gradients", {"enable_checkpointing": False})
    assert "--trainer.devices" in text
    shown = text[text.index("--trainer.enable_checkpointing ") :]
    assert shown[: shown.index("--trainer.", 5)].rstrip().endswith("default: False)")


def test_a_recipe_of_the_package_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(PACKAGE / "configs" / "warmup.yaml")
    assert shipped_recipes(["--config", "warmup", "--out", "warmup"]) == ["--config", recipe, "--out", "warmup"]
    assert shipped_recipes(["--config=warmup"]) == ["--config", recipe]
    (tmp_path / "warmup").write_text("")  # a file of that name comes first
    assert shipped_recipes(["--config", "warmup"]) == ["--config", "warmup"]


def test_a_folder_of_a_recipes_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`icons warmup --config warmup --out warmup`, run again, has a folder of that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "warmup").mkdir()
    assert shipped_recipes(["--config", "warmup"])[1].endswith("configs/warmup.yaml")
    (tmp_path / "select").write_text("fraction: 0.3\n")
    assert shipped_recipes(["--config", "select"])[1] == "select"
