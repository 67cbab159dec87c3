"""The shell completes commands, options and choices; bash itself is asked."""

import subprocess
import sys
from pathlib import Path

import pytest

from icons.cli import main
from icons.cli.command_line import COMMANDS


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    code = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_icons; echo ${{COMPREPLY[@]}}"
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", "bash"]) == 0
    script = tmp_path / "icons.bash"
    script.write_text(capsys.readouterr().out)
    assert set(completed(script, "icons", "")) >= set(COMMANDS)
    assert completed(script, "icons", "gradients", "--chunk") == ["--chunk-rows"]
    assert completed(script, "icons", "gradients", "--projector", "ra") == ["rademacher"]


def test_what_is_missing_or_unknown_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--print-completion", "fish"]) == 2
    assert "--print-completion 'fish': expected one of bash, zsh, tcsh" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 1
    assert "needs shtab, which is not installed: pip install 'icons-lightning[completion]'" in capsys.readouterr().err
