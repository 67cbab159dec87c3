"""The tables of the study: dictionaries as the rows of a CSV file."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icons.output import whole_file


def write_table(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows, whole or not at all; a column for every name that one of them has, as they appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with whole_file(file) as partial, partial.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
