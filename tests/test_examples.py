"""The examples in docstrings do what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import icons

PACKAGE = Path(icons.__file__).parent
MODULES = [
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    for file in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in file.read_text() and file.name != "__init__.py"
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
