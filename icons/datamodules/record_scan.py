"""Where the records of a data file lie: byte ranges found in one pass over blocks, without parsing.

Only structure is looked at (newlines; quotes, braces and brackets outside strings), so a record that is not valid JSON
keeps its place and fails when it is read. Memory is that of a block and its ranges, whatever the file's size.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import numpy as np
from jaxtyping import Int, UInt8

Form = Literal["json", "jsonl", "dict"]
Ranges = Int[np.ndarray, "records 2"]
Bytes = UInt8[np.ndarray, " size"]

BLOCK_BYTES = 1 << 22
FIRST_LINE_BYTES = 1 << 24
NEWLINE, QUOTE, BACKSLASH = 10, 34, 92
KIND = np.zeros(256, dtype=np.uint8)
KIND[[ord(sign) for sign in '"\\{[}]']] = [1, 2, 3, 3, 4, 4]
DEPTH = np.array([0, 0, 0, 1, -1], dtype=np.int8)
SPACE = b" \t\r\n"
OBJECT_OF_OBJECTS = re.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{')


def recognise(path: Path) -> Form:
    """A JSON list (`json`), JSON Lines (`jsonl`), or a JSON object of records by key (`dict`).

    Raises:
        ValueError: the file is empty, or begins as none of these.
    """
    with path.open("rb") as file:
        head = file.read(FIRST_LINE_BYTES)
    start = head.lstrip(b"\xef\xbb\xbf" + SPACE)
    if not start:
        raise ValueError(f"{path}: the file is empty; expected LLaVA JSON or JSONL")
    if start[:1] == b"[":
        return "json"
    if OBJECT_OF_OBJECTS.match(start):
        line, _, rest = start.partition(b"\n")
        try:
            first = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return "dict"
        if not rest.strip() and isinstance(first, dict) and all(isinstance(value, dict) for value in first.values()):
            return "dict"
    if start[:1] == b"{" or b"\n" in start:  # JSON Lines may begin with a broken line
        return "jsonl"
    raise ValueError(f"{path}: begins with {start[:20]!r}; expected a JSON list, a JSON object of records, or JSONL")


def scan(blocks: Iterator[bytes], form: Form, path: Path) -> Iterator[Ranges]:
    """Byte ranges of the records, in order, some at a time.

    Args:
        blocks: the file's bytes, in order.
        form: as `recognise` found it.
        path: for messages.

    Raises:
        ValueError: a list or object that does not close, or holds something else than objects.
    """
    return scan_lines(blocks) if form == "jsonl" else scan_document(blocks, form, path)


def read_blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK_BYTES):
        yield block


def scan_lines(blocks: Iterator[bytes]) -> Iterator[Ranges]:
    """Lines, without those that hold only white space."""
    base = begin = 0
    last = b""
    for block in blocks:
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == NEWLINE) + base
        if len(ends):
            begins = np.concatenate([[begin], ends[:-1] + 1])
            keep = np.ones(len(ends), dtype=bool)
            for place in np.flatnonzero(ends - begins < 8).tolist():
                text = last if place == 0 else b""
                keep[place] = bool((text + block[max(0, begins[place] - base) : ends[place] - base]).strip())
            yield np.stack([begins, ends], axis=1)[keep]
            begin, last = int(ends[-1]) + 1, b""
        base += len(block)
        last = (last + block[max(0, begin - base + len(block)) :])[:8]
    if base > begin and last.strip():
        yield np.array([[begin, base]], dtype=np.int64)


def scan_document(blocks: Iterator[bytes], form: Form, path: Path) -> Iterator[Ranges]:
    """Objects directly inside the outer list or object."""
    base = depth = 0
    inside = False
    open_begin = previous_end = -1
    outer_end = None
    for block in whole_escapes(blocks):
        data = np.frombuffer(block, np.uint8)
        kind = KIND[data]
        places = np.flatnonzero(kind)
        kind = kind[places]
        if (kind == 2).any():
            escaped = escaped_places(places[kind == 2])
            keep = (kind != 2) & ~np.isin(places, escaped)
            places, kind = places[keep], kind[keep]
        quotes = np.cumsum(kind == 1)
        outside = (quotes + inside) % 2 == 0
        inside ^= bool(quotes[-1] % 2) if len(quotes) else False
        structural = outside & (kind > 2)
        places, change = places[structural], DEPTH[kind[structural]]
        after = depth + np.cumsum(change, dtype=np.int64)
        begins = places[(after == 2) & (change == 1)] + base
        ends = places[(after == 1) & (change == -1)] + base + 1
        starts = places[(after == 1) & (change == 1)] + base + 1
        closed = places[(after == 0) & (change == -1)] + base
        if len(starts):
            previous_end = int(starts[0])
        if open_begin >= 0:
            begins = np.concatenate([[open_begin], begins])
        open_begin = int(begins[-1]) if len(begins) > len(ends) else -1
        found = np.stack([begins[: len(ends)], ends], axis=1)
        if len(found):
            if form == "json":
                check_gaps(data, base, previous_end, found, path)
            previous_end = int(found[-1, 1])
            yield found
        depth = int(after[-1]) if len(after) else depth
        base += len(block)
        if len(closed) and outer_end is None:
            outer_end = int(closed[0])
    if outer_end is None or depth != 0:
        where = f"the record that begins at byte {open_begin}" if open_begin >= 0 else "the outer list"
        raise ValueError(
            f"{path}: not valid JSON: {where} is not closed, or a quote before it is; expected a list of records. "
            "Mend the file, or write it as JSONL, where a broken record costs one row"
        )


def whole_escapes(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, cut so that no block ends with a backslash."""
    carry = b""
    for block in blocks:
        block = carry + block
        kept = block.rstrip(b"\\")
        carry = block[len(kept) :]
        if kept:
            yield kept
    if carry:
        yield carry


def escaped_places(
    backslashes: Int[np.ndarray, " backslashes"],
) -> Int[np.ndarray, " escaped"]:
    """Places after a run of backslashes of odd length.

    >>> escaped_places(np.array([3, 7, 8, 20, 21, 22])).tolist()
    [4, 23]
    """
    first = np.flatnonzero(np.diff(backslashes, prepend=-2) != 1)
    last = np.append(first[1:], len(backslashes)) - 1
    odd = (last - first) % 2 == 0
    return backslashes[last[odd]] + 1


def check_gaps(data: Bytes, base: int, previous_end: int, found: Ranges, path: Path) -> None:
    """Between two records of a list stands a comma and white space; anything else would be a record that is missed."""
    before = np.concatenate([[previous_end], found[:-1, 1]])
    size = found[:, 0] - before
    for length in np.unique(size).tolist():
        rows = np.flatnonzero((size == length) & (before >= base))
        signs = data[(before[rows] - base)[:, None] + np.arange(length)]
        spaces = np.isin(signs, np.frombuffer(SPACE, np.uint8)).sum(axis=1)
        commas = (signs == ord(",")).sum(axis=1)
        wrong = rows[spaces + commas != length]
        if len(wrong):
            place = int(before[wrong[0]])
            text = data[place - base : int(found[wrong[0], 0]) - base].tobytes()[:40].decode("utf-8", "replace")
            raise ValueError(f"{path}: {text!r} at byte {place}; expected only objects, with commas, in the list")
