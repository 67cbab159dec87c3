"""The library is silent until somebody listens; commands listen, as loudly as they are told to."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from icons.cli import main
from icons.cli.console import ConsoleHandler, console, listen, warn
from icons.store import GradientStore

log = logging.getLogger("icons.modules.sample")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    log.debug("a detail")
    log.info("[a] step")
    log.warning("a doubt")
    console.print("a result")
    captured = capsys.readouterr()
    return captured.err + captured.out


def test_loudness(capsys: pytest.CaptureFixture[str]) -> None:
    listen()
    assert said(capsys) == "[a] step\nwarning: a doubt\na result\n"
    listen(quiet=True)
    assert said(capsys) == "warning: a doubt\n"
    listen(verbose=True)
    assert said(capsys) == "a detail\n[a] step\nwarning: a doubt\na result\n"
    handlers = logging.getLogger("icons").handlers
    assert sum(isinstance(handler, ConsoleHandler) for handler in handlers) == 1


@pytest.mark.parametrize(
    ("words", "details"),
    [
        (
            ["status", "{store}", "--as-json"],
            [r"StatusOptions\(store=", "kind gradient, format 2, arrays"],
        ),
        (["verify", "{store}"], [r"VerifyOptions\(", r"store.zarr: units 0 to 1: 2 written, read again; 0 findings"]),
        (["tasks", "list", "gqa"], [r"TasksOptions\(action='list', name='gqa'"]),
        (["doctor"], [r"DoctorOptions\(", r"store returns what was written: [\d.]+ s"]),
        (
            ["status", "{store}s"],
            ["where this comes from:", r"Traceback", "FileNotFoundError: store .*: no such"],
        ),
    ],
)
def test_verbose_adds_details_on_stderr_alone(
    words: list[str], details: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = GradientStore.create(tmp_path / "store.zarr", num_rows=4, dim=2, dtype="float32", chunk_rows=2, manifest={})
    one = np.ones(2, np.float32)
    columns = {"gradient": one[:, None] * one, "norm": one, "loss": one, "tokens": one.astype(np.int32)}
    for unit in range(2):
        made.write_unit(unit, columns | {"status": one.astype(np.uint8)})
    line = [word.format(store=made.path) for word in words]
    capsys.readouterr()
    status, plain = main(line), capsys.readouterr()
    assert main([*line, "--verbose"]) == status
    loud = capsys.readouterr()
    assert loud.out == plain.out and plain.err in loud.err
    assert not [said for said in details if not re.search(said, loud.err)], loud.err


def test_a_warning_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    warn("a [red]path")
    assert capsys.readouterr().out == "warning: a [red]path\n"


def test_the_library_is_silent_by_default() -> None:
    code = "import logging, icons; logging.getLogger('icons.modules.fit').warning('nobody asked')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout + ran.stderr == ""
