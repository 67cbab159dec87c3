import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from icons.consensus.selection_file import manifest_path, manifest_text, open_selection, write_table

ROWS = np.array([1, 5, 7])
COLUMNS = {"row": ROWS, "id": np.array(["a", "b,c", 'd"'], dtype=object), "score": np.array([0.5, 1.0, 0.1])}


def test_a_manifest_is_found_through_the_selected_data(tmp_path: Path) -> None:
    path = manifest_path(tmp_path / "selected.json")
    path.write_text(manifest_text(ROWS, {"method": "vote", "num_rows": 9}, {}))
    assert path.name == "selected.json.manifest.json"
    for name in (tmp_path / "selected.json", path):
        saved = open_selection(name)
        assert saved.rows.tolist() == [1, 5, 7] and saved.rows.dtype == np.int64
        assert saved.manifest["method"] == "vote" and saved.manifest["num_rows"] == 9
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "no selection manifest of format 1")])
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "s.json.manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_selection(tmp_path / "s.json")


def test_a_selection_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no s.json.manifest.json beside it"):
        open_selection(tmp_path / "s.json")


def test_tables_read_back_as_they_were(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_table(tmp_path / "t.csv", COLUMNS)
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["row", "id", "score"],
            ["1", "a", "0.5"],
            ["5", "b,c", "1.0"],
            ["7", 'd"', "0.1"],
        ]
    write_table(tmp_path / "t.parquet", COLUMNS)
    assert parquet.read_table(tmp_path / "t.parquet").to_pydict() == {
        name: list(part) for name, part in COLUMNS.items()
    }


def test_tables_of_other_kinds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"got suffix '.xlsx'; expected .csv or .parquet"):
        write_table(tmp_path / "t.xlsx", COLUMNS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="Parquet needs pyarrow"):
        write_table(tmp_path / "t.parquet", COLUMNS)
