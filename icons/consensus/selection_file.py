"""A selection on disk: its manifest beside the selected data, and its table."""

import csv
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from icons.manifest import DataEntry, Manifest, versions
from icons.output import MARK, is_partial, put, read_object, whole_file

_FORMAT = 1
_SUFFIX = ".manifest.json"
_DATA = "data/"
NOTE = "unfinished selection"


class SelectionManifest(Manifest, frozen=True, kw_only=True):
    """What the manifest of a selection states."""

    num_rows: int = 0
    num_selected: int = 0
    method: str = "?"
    fraction: float
    thresholds: dict[str, float]
    data: DataEntry = DataEntry()
    scores: dict[str, Any] = {}
    border: dict[str, Any] = {}
    health: dict[str, Any] | None = None
    warnings: list[str] = []


@dataclass(frozen=True)
class SavedSelection:
    """A selection as it was saved.

    Attributes:
        rows: the selected rows of the pool, ascending.
        manifest: what it was made from and with; `facts`, what this version reads of it.
    """

    rows: Int[np.ndarray, " selected"]
    manifest: dict[str, Any]

    @property
    def facts(self) -> SelectionManifest:
        """Raises ValueError where an entry is missing, or has another type."""
        return SelectionManifest.read(self.manifest, "selection")


def manifest_path(selection: Path) -> Path:
    """Where the manifest of `selected.json` lies: `selected.json.manifest.json`."""
    return selection if selection.name.endswith(_SUFFIX) else selection.with_name(selection.name + _SUFFIX)


def note_path(selection: Path) -> Path:
    """Where the note lies that a selection is being written, or was when it was killed (see `SelectionOutput`)."""
    return selection.with_name(f".{selection.name}.unfinished")


def noted(selection: Path) -> dict[str, list[str]]:
    """What the note says of each file that runs which did not end were about to write: its digests."""
    written = read_object(note_path(selection)).get("written")
    return {name: list(several) for name, several in written.items()} if isinstance(written, dict) else {}


def manifest_text(rows: Int[np.ndarray, " selected"], manifest: Mapping[str, Any], written: Mapping[str, str]) -> str:
    """The content of a manifest.

    Args:
        rows: selected, ascending.
        manifest: what they were selected from and with.
        written: digests of the files beside it.
    """
    made_by = {"versions": versions("icons-lightning", "numpy"), "written": dict(written)}
    whole = {"format": _FORMAT, "kind": "selection", **manifest, **made_by, "rows": rows.tolist()}
    return json.dumps(whole, default=str) + "\n"


def list_paths(selection: Path) -> dict[str, Path]:
    """Where the lists of a selection lie: `selected.json.rows.npy` and `selected.json.ids.txt`."""
    return {name: selection.with_name(f"{selection.name}.{name}") for name in ("rows.npy", "ids.txt")}


def save_lists(paths: Mapping[str, Path], rows: Int[np.ndarray, " selected"], ids: Sequence[str]) -> None:
    """Writes the selected rows (int64) and the records' ids, one a line (empty for one without), in the same order, to
    the places that `list_paths` names."""
    with whole_file(paths["rows.npy"]) as partial:
        np.save(partial, np.asarray(rows, dtype=np.int64))
    put(paths["ids.txt"], "".join(" ".join(name.splitlines()) + "\n" for name in ids))


def is_manifest(path: Path) -> bool:
    """Whether a file is the manifest of a selection."""
    return read_object(path).get("kind") == "selection"


def is_note(path: Path) -> bool:
    """Whether a file is the note of a selection that is being written."""
    return read_object(path).get("kind") == NOTE


def is_written_by(selection: Path, name: str, file: Path) -> bool:
    """Whether `file` is what the selection's manifest calls its `data`, `table`, `rows.npy` or `ids.txt`, with not a
    byte changed since; or what a run that did not end was about to write there."""
    known = _known(selection).get(name, [])
    return bool(known) and file.is_file() and digest(file) in known


def foreign_files(selection: Path) -> list[Path]:
    """Files that the selection, a folder, did not write or that were changed since, where the next one would replace
    them: at its top, and in folders that it made."""
    known = {name.removeprefix(_DATA): several for name, several in _known(selection).items() if name.startswith(_DATA)}
    made = {Path(name).parts[0] for name in known}
    foreign = []
    for file in sorted(file for file in selection.rglob("*") if not file.is_dir()):
        inner = file.relative_to(selection)
        own = inner.name == MARK or is_partial(inner.name)
        at_risk = len(inner.parts) == 1 or inner.parts[0] in made
        if at_risk and not own and not (file.is_file() and digest(file) in known.get(inner.as_posix(), [])):
            foreign.append(file)
    return foreign


def digests(name: str, path: Path) -> dict[str, str]:
    """Of a file under its name in the manifest; of a folder of each file in it, under `name/` and its place there."""
    if path.is_file():
        return {name: digest(path)}
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != MARK]
    return {f"{name}/{file.relative_to(path).as_posix()}": digest(file) for file in files}


def _known(selection: Path) -> dict[str, list[str]]:
    """The digests of each file of a selection: those that the note and the manifest state."""
    known = noted(selection)  # first: it goes when the manifest has come
    manifest = read_object(manifest_path(selection))
    written = manifest.get("written")
    if manifest.get("kind") == "selection" and isinstance(written, dict):
        for name, content in written.items():
            known.setdefault(name, []).append(content)
    return known


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def open_selection(selection: Path) -> SavedSelection:
    """Reads the manifest of a selection, given the selected data's path or the manifest's own.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: the file is something else, or of a format that this version does not know; or a run that was
            writing the selection did not end.
    """
    path = manifest_path(selection)
    if note_path(path.with_name(path.name.removesuffix(_SUFFIX))).exists():
        raise ValueError(
            f"selection {selection}: a run was about to replace it and did not end, so that its files may not belong "
            "together; run that `icons select` line again"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"selection {selection}: has no {path.name} beside it; expected one made by `icons select`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"selection {path}: is not JSON ({error}); expected a manifest made by `icons select`"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("kind") != "selection" or manifest.get("format") != _FORMAT:
        raise ValueError(
            f"selection {path}: is no selection manifest of format {_FORMAT}; expected one by `icons select`"
        )
    rows = np.asarray(manifest.pop("rows"), dtype=np.int64)
    return SavedSelection(rows, manifest)


def _cell(value: object) -> object:
    """A cell of a CSV file that no spreadsheet takes for a formula: a text that begins like one is quoted.

    >>> _cell("=1+1"), _cell("r7"), _cell(-0.5)
    ("'=1+1", 'r7', -0.5)
    """
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@")) else value


def write_table(path: Path, columns: Mapping[str, Shaped[np.ndarray, " rows"]]) -> None:
    """Writes columns of equal length as CSV or Parquet, by the file's suffix.

    Raises:
        ValueError: another suffix; or Parquet, and pyarrow is not installed.
    """
    if path.suffix == ".csv":
        with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([_cell(name) for name in columns])
            rows = zip(*(column.tolist() for column in columns.values()), strict=True)
            writer.writerows([_cell(value) for value in row] for row in rows)
    elif path.suffix == ".parquet":
        try:
            pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        except ModuleNotFoundError as error:
            raise ValueError(
                f"table {path}: Parquet needs pyarrow, which is not installed; pip install 'icons-lightning[table]', "
                "or take .csv"
            ) from error
        with whole_file(path) as partial:
            table = pyarrow.table({name: pyarrow.array(column) for name, column in columns.items()})
            parquet.write_table(table, partial)
    else:
        raise ValueError(f"table {path}: got suffix {path.suffix!r}; expected .csv or .parquet")
