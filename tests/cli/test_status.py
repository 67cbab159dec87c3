"""`icons status` says how far a store is, why rows failed, and which array jobs still have work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icons.cli import main
from icons.store import GradientStore


def make(path: Path, units: list[int], **settings: Any) -> str:
    store = GradientStore.create(
        path, num_rows=40, dim=4, chunk_rows=4, manifest={"model": {"fingerprint": "m1"}, "settings": settings}
    )
    ones = np.ones(4, np.float32)
    for unit in units:
        status = np.array([1, 1, 3, 4], np.uint8)
        results = {"gradient": np.ones((4, 4)), "norm": ones, "loss": ones, "tokens": ones, "status": status}
        store.write_unit(unit, results)
    return store.path


def test_missing_units_are_array_indices_of_one_job_per_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / "s", [1, 4, 5])
    assert main(["status", path, "--missing"]) == 0
    assert capsys.readouterr().out == "0,2-3,6-9\n"


def test_missing_units_are_array_indices_of_the_shards_the_store_was_made_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / "s", [0, 1, 3, 4, 6, 7, 9], shards=3)
    assert main(["status", path, "--missing"]) == 0
    assert capsys.readouterr().out == "2\n"
    assert main(["status", path, "--missing", "--shards", "5"]) == 0
    assert capsys.readouterr().out == "0,2-3\n"


def test_a_finished_store_has_no_missing_indices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", make(tmp_path / "s", list(range(10))), "--missing"]) == 0
    assert capsys.readouterr().out == "\n"


def test_quiet_leaves_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", make(tmp_path / "s", [1]), "--quiet"]) == 0
    assert "1 of 10 done" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "s"), "--shards", "0"]) == 2
    assert main(["tasks", "list", "--quiet"]) == 0
    assert "gqa" in capsys.readouterr().out


def test_all_of_it_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", make(tmp_path / "s", [1, 4, 5])]) == 0
    shown = capsys.readouterr().out
    for part in (
        "done       6   failed 6   missing 28",
        "3 of 10 done, 4 rows each",
        "failed 3 rows: image_missing",
        "row 18: its image is missing",
        "failed 3 rows: image_broken",
        "units 0,2-3,6-9",
        "--array=0,2-3,6-9 with --shard $SLURM_ARRAY_TASK_ID/10",
        '{"fingerprint": "m1"}',
    ):
        assert part in shown, shown


def test_as_json_is_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", make(tmp_path / "s", [0]), "--as-json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == {"done": 2, "failed": 2, "missing": 36} and found["units"]["missing"] == list(range(1, 10))
    assert found["failed"] == {"image_missing": 1, "image_broken": 1} and found["manifest"]["kind"] == "gradient"


def test_what_is_no_store_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "absent")]) == 1
    assert "icons status: error: store" in capsys.readouterr().err
