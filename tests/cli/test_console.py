"""The library is silent until somebody listens; commands listen, as loudly as they are told to."""

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from icons.cli.console import ConsoleHandler, console, listen, warn

log = logging.getLogger("icons.modules.sample")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    logger = logging.getLogger("icons")
    before = logger.level, list(logger.handlers), console.quiet
    yield
    logger.level, logger.handlers, console.quiet = before


def said(capsys: pytest.CaptureFixture[str]) -> str:
    log.debug("a detail")
    log.info("[a] step")
    log.warning("a doubt")
    console.print("a result")
    return capsys.readouterr().out


def test_loudness(capsys: pytest.CaptureFixture[str]) -> None:
    listen()
    assert said(capsys) == "[a] step\nwarning: a doubt\na result\n"
    listen(quiet=True)
    assert said(capsys) == "warning: a doubt\n"
    listen(verbose=True)
    assert said(capsys) == "a detail\n[a] step\nwarning: a doubt\na result\n"
    handlers = logging.getLogger("icons").handlers
    assert sum(isinstance(handler, ConsoleHandler) for handler in handlers) == 1


def test_a_warning_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    warn("a [red]path")
    assert capsys.readouterr().out == "warning: a [red]path\n"


def test_the_library_is_silent_by_default() -> None:
    code = "import logging, icons; logging.getLogger('icons.modules.fit').warning('nobody asked')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout + ran.stderr == ""
