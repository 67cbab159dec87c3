"""The command line: words in, options out; one line for what the user can mend."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from icons.cli import command_line as cli
from icons.cli.options.status import StatusOptions


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`icons status`, but for what it does."""

    def status(options: StatusOptions) -> int:
        raise ValueError(f"the store {options.store} is not strict")

    module = types.ModuleType("icons.cli.status")
    module.status = status  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "icons.cli.status", module)


def test_a_users_error_is_one_line(installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "s.zarr"]) == 1
    assert capsys.readouterr().err == "icons status: error: the store s.zarr is not strict\n"


def test_traceback_on_demand(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICONS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="not strict"):
        cli.main(["status", "s.zarr"])


def test_usage_errors_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 2
    assert "missing: STORE" in capsys.readouterr().err
    assert cli.main(["selct"]) == 2
    assert "no command 'selct'; expected one of demo, warmup" in capsys.readouterr().err
    assert cli.main(["verify", "s.zarr", "--repare"]) == 2
    assert "error: --repare: no such option; did you mean --repair?" in capsys.readouterr().err
    assert cli.main(["verify", "s.zarr", "--zzz=1"]) == 2
    assert capsys.readouterr().err.endswith("error: --zzz: no such option\n")
    assert cli.main(["tasks", "lst"]) == 2
    assert "error: ACTION lst: expected one of build, list" in capsys.readouterr().err
    assert cli.main([]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["warmup", "--epochs=0"], "--epochs 0: expected 1 or more"),
        (["warmup", "--batch-size=0"], "--batch-size 0: expected 1 or more"),
        (["gradients", "--batch-size=-1"], "--batch-size -1: expected 1 or more"),
        (["warmup", "--lora-targets=("], "--lora-targets (: is no regular expression"),
    ],
)
def test_values_that_nothing_can_be_done_with_are_usage_errors(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--model=m", "--data=d", "--out=o"]) == 2
    assert message in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0


def test_a_command_is_called_by_the_names_of_its_options() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument.*stor"):
        cli.call("status", store="s.zarr", stor="s.zarr")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cli.call("status", store="nowhere.zarr")


def test_no_help_imports_what_is_slow() -> None:
    """Not one second per `--help`: what takes it is imported when a command runs."""
    slow = ("torch", "lightning", "transformers", "peft", "numpy", "zarr", "matplotlib", "rich", "PIL")
    code = f"""
import contextlib, io, sys
from icons.cli import main
from icons.cli.command_line import COMMANDS
with contextlib.redirect_stdout(io.StringIO()) as text:
    assert main(["--help"]) == 0
    assert "jsonargparse" not in sys.modules, "the list of commands needs no parser"
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert f"usage: icons {{name}}" in text.getvalue()
print([name for name in {slow} if name in sys.modules], len(sys.modules) < 600)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "[] True\n", ran.stderr


@pytest.mark.parametrize("said", ["can't start new thread", "[enforce fail] DefaultCPUAllocator: not enough memory: 8"])
def test_a_system_that_gives_no_more_is_one_line(
    installed: None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: object) -> None:
        raise RuntimeError(f"{said}\nframe #0")

    monkeypatch.setattr(cli, "command_of", lambda _: command)
    assert cli.main(["compare", "a", "b"]) == 1
    expected = f"icons compare: error: {said}: {cli.SHORTAGE}"
    assert " ".join(capsys.readouterr().err.split()) == expected


def test_a_gpu_without_room_is_one_line(
    installed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "CUDA out of memory. Tried to allocate 648.00 MiB. GPU 0 has a total capacity of 79.18 GiB."
    rest = " Including non-PyTorch memory, this process has 78.71 GiB memory in use. See documentation"

    def command(_: object) -> None:
        raise torch.OutOfMemoryError(said + rest)

    monkeypatch.setattr(cli, "command_of", lambda _: command)
    assert cli.main(["compare", "a", "b"]) == 1
    expected = f"icons compare: error: {said.rstrip('.')}: {cli.NO_ROOM}"
    assert " ".join(capsys.readouterr().err.split()) == expected


def test_a_disk_that_fills_while_tensors_are_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(options: object) -> int:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(cli, "command_of", lambda name: full)
    assert cli.main(["status", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "icons status: error: Error while serializing: I/O error: No space left" in said.replace("\n", " ")
