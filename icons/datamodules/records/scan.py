"""One pass over a data file: where each record begins and ends, and the file's SHA-256. Vectorised, no JSON parser."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from jaxtyping import Int, UInt8

from icons.datamodules.records.data_file import DataFile, sha256

EXPECTED = "expected JSON or JSONL, Parquet, a Hugging Face data set or a WebDataset tar"
_LOOKED_AT = 1 << 16  # bytes in which one line of a JSONL file at least begins as an object
BLOCK = 1 << 20  # fits the processor's cache: half again as fast as 8 MB
_QUOTE, _BACKSLASH, _COMMA, _NEWLINE = b'"\\,\n'
_WHITE = b" \t\r\n"
_STRUCTURE = np.zeros(256, dtype=bool)
_STRUCTURE[list(b'"{}[],')] = True
_DEPTH = np.zeros(256, dtype=np.int8)
_DEPTH[list(b"{[")] = 1
_DEPTH[list(b"}]")] = -1


class Layout(NamedTuple):
    """What a scan finds: `ranges [N, 2]` int64 byte offsets, the form of the file, and its SHA-256."""

    ranges: np.ndarray
    form: Literal["list", "object", "lines"]
    digest: str


def scan(path: Path) -> Layout:
    """Finds the records of a file.

    Raises:
        ValueError: the file is empty, is not JSON of one of the three forms, or breaks off.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; {EXPECTED}")
    content = DataFile(path)
    with ThreadPoolExecutor(1) as background:
        digest = background.submit(sha256, path)  # releases the interpreter: runs beside the search
        form = _form_of(path, content)
        ranges = _line_ranges(content) if form == "lines" else _nested_ranges(path, content)
        return Layout(ranges, form, digest.result())


def _form_of(path: Path, content: DataFile) -> Literal["list", "object", "lines"]:
    """A list begins with `[`; a first line that is a whole object of its own begins JSON Lines, unless it is all."""
    begin = _first_of(content)
    if content[begin : begin + 1] == b"[":
        return "list"
    if content[begin : begin + 1] == b"<":
        raise ValueError(f"{path}: is a web page or XML: download it again; {EXPECTED}")
    lines = content[begin : begin + _LOOKED_AT].splitlines()
    if lines and not any(line.lstrip(_WHITE)[:1] == b"{" for line in lines) and not _is_value(lines[0]):
        first = lines[0][:60].decode(errors="replace")
        raise ValueError(
            f"{path}: begins with {first!r}, and no line near its beginning with a JSON object; {EXPECTED}"
        )
    end = content.find(b"\n", begin)
    try:
        first = msgspec.json.decode(content[begin : end if end >= 0 else len(content)])
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deeply: its row's affair
        following = content[end + 1 : end + 1 + _LOOKED_AT].splitlines() if end >= 0 else []
        if any(line[:1] == b"{" and _is_value(line) for line in following):
            return "lines"  # a record a line, of which the first is broken
        return "object" if content[begin : begin + 1] == b"{" and _looks_nested(content, begin) else "lines"
    if not isinstance(first, dict):
        raise ValueError(
            f"{path}: begins with {str(first)[:40]!r}; expected a list, an object of records, or JSON Lines"
        )
    alone = end < 0 or not content[end : end + 4096].strip(_WHITE)
    return "object" if alone and first and all(isinstance(value, dict) for value in first.values()) else "lines"


def _is_value(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except (ValueError, RecursionError):
        return False
    return True


def _first_of(content: DataFile) -> int:
    begin = 3 if content[:3] == b"\xef\xbb\xbf" else 0
    while begin < len(content) and content[begin : begin + 1] in (b" ", b"\t", b"\r", b"\n"):
        begin += 1
    return begin


def _looks_nested(content: DataFile, begin: int) -> bool:
    """Whether `{` is followed by a key whose value is an object: `{"id": {`."""
    head = content[begin + 1 : begin + 4096].lstrip(_WHITE)
    rest = head[1:].partition(b'"')[2].lstrip(_WHITE)
    return head[:1] == b'"' and rest[:1] == b":" and rest[1:].lstrip(_WHITE)[:1] == b"{"


def blocks(content: DataFile) -> Iterator[tuple[int, UInt8[np.ndarray, " bytes"]]]:
    for begin in range(0, len(content), BLOCK):
        yield begin, np.frombuffer(content[begin : begin + BLOCK], dtype=np.uint8)


def _line_ranges(content: DataFile) -> Int[np.ndarray, "rows 2"]:
    """Lines that are not blank."""
    ends = [begin + np.flatnonzero(block == _NEWLINE) for begin, block in blocks(content)]
    ranges = np.empty((sum(map(len, ends)) + 1, 2), np.int64)
    np.concatenate([*ends, [len(content)]], out=ranges[:, 1])
    ends.clear()  # as large as half of the ranges
    ranges[0, 0] = _first_of(content) if content[:3] == b"\xef\xbb\xbf" else 0
    np.add(ranges[:-1, 1], 1, out=ranges[1:, 0])
    if not (whole := ranges[:, 1] > ranges[:, 0]).all():
        ranges = ranges[whole]
    short = np.flatnonzero(ranges[:, 1] - ranges[:, 0] < 64)  # no record is that short: look at these for blank ones
    blank = [index for index in short.tolist() if not content[slice(*ranges[index].tolist())].strip(_WHITE)]
    return np.delete(ranges, blank, axis=0) if blank else ranges


def _nested_ranges(path: Path, content: DataFile) -> Int[np.ndarray, "rows 2"]:
    """What stands between the outermost brackets and the commas of depth one; strings are skipped, escapes heeded."""
    depth, inside, carried = 0, False, 0  # before the block: nesting, in a string, length of a run of backslashes
    cuts: list[np.ndarray] = []
    for begin, block in blocks(content):
        position = np.flatnonzero(_STRUCTURE[block])
        kind = block[position]
        quote = kind == _QUOTE
        quote[quote] = ~_escaped(block, position[quote], carried)
        keep = quote | (kind != _QUOTE)
        position, kind, quote = position[keep], kind[keep], quote[keep]
        in_string = (np.cumsum(quote) + inside) % 2 == 1
        inside = bool(in_string[-1]) if len(quote) else inside
        outside = ~in_string & ~quote
        position, kind = position[outside], kind[outside]
        change = _DEPTH[kind]
        after = depth + np.cumsum(change, dtype=np.int64)
        before = after - change
        at = ((kind == _COMMA) & (after == 1)) | ((change == 1) & (before == 0)) | ((change == -1) & (after == 0))
        cuts.append(begin + position[at])
        depth = int(after[-1]) if len(after) else depth
        if depth < 0 or (len(after) and after.min() < 0):
            raise ValueError(
                f"{path}: a closing bracket too many before byte {begin + len(block)}; expected valid JSON"
            )
        carried = _trailing_backslashes(block, carried)
    if depth or inside:
        what = "inside a string" if inside else f"with {depth} brackets open"
        raise ValueError(
            f"{path}: the file ends {what}; expected a whole JSON list: it was cut off, or a record has an "
            "unbalanced quote or bracket (JSON Lines keeps such damage to one row)"
        )
    cut = np.concatenate(cuts)
    ranges = np.stack([cut[:-1] + 1, cut[1:]], axis=1)
    last = slice(*ranges[-1].tolist())
    return ranges[:-1] if not content[last].strip(_WHITE) else ranges  # an empty list, or a comma after the last record


def _escaped(block: UInt8[np.ndarray, " bytes"], quotes: Int[np.ndarray, " quotes"], carried: int) -> Any:
    """Which of the quotes stand behind an odd number of backslashes; `carried` of them end the block before."""
    escaped = np.zeros(len(quotes), dtype=bool)
    open_runs = np.arange(len(quotes))
    distance = 1
    while len(open_runs):
        position = quotes[open_runs] - distance
        in_block = position >= 0
        more = np.zeros(len(open_runs), dtype=bool)
        more[in_block] = block[position[in_block]] == _BACKSLASH
        if (position == -1).any() and carried % 2:
            escaped[open_runs[position == -1]] ^= True
        open_runs = open_runs[more]
        escaped[open_runs] ^= True
        distance += 1
    return escaped


def _trailing_backslashes(block: UInt8[np.ndarray, " bytes"], carried: int) -> int:
    """Length of the run of backslashes that ends the block, with what came before if the block is nothing else."""
    run = 0
    while run < len(block) and block[-1 - run] == _BACKSLASH:
        run += 1
    return run + (carried if run == len(block) else 0)
