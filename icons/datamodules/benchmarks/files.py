"""The files of a benchmark: found in the folders that they unpack to, read, or refused in one line."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec


def read_text(path: Path) -> str:
    """A text file of a benchmark, without a byte order mark.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; convert the file, or download it again") from error


def read_json(path: Path) -> Any:
    """A JSON file of a benchmark.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return msgspec.json.decode(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download it again") from error


def read_lines(path: Path) -> Iterator[Any]:
    """The records of a JSON-lines file of a benchmark; empty lines are skipped.

    Raises:
        ValueError: a line is not JSON.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield msgspec.json.decode(line)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error}); download it again") from error


def locate(source: Path, *patterns: str) -> Path:
    """The first path below `source` that fits one of the glob `patterns`, at most two folders deep.

    Raises:
        FileNotFoundError: none does.
    """
    for pattern in patterns:
        for depth in ("", "*/", "*/*/"):
            matching = sorted(path for path in source.glob(depth + pattern) if path.is_file() or path.is_dir())
            if matching:
                return matching[0]
    raise FileNotFoundError(f"no {' or '.join(patterns)} in {source}")


def locate_beside(file: Path, source: Path, *patterns: str) -> Path:
    """The first path that fits, nearest to `file`: beside it, or in a folder around it, and only then anywhere.

    Where the parts of a benchmark unpack side by side, each has a folder of the same name.

    Raises:
        FileNotFoundError: none does.
    """
    for folder in file.parents:
        for pattern in patterns:
            matching = sorted(path for path in folder.glob(pattern) if path.is_dir())
            if matching:
                return matching[0]
        if folder == source:
            break
    return locate(source, *patterns)
