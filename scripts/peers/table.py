"""The tables that are kept beside the scripts: CSV files with a row per result."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of the same columns, with their folder if it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)
