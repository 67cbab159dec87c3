"""A run of `icons influence` beside others: of the same scores, and of what they are made from."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lightning.fabric import Fabric

from icons.agreement import STATUSES
from icons.modules.scoring import Scoring
from icons.scores import influence
from icons.store import GradientStore, ScoreStore
from icons.store.former import discard
from icons.store.lease import Leases
from icons.store.storage import Storage
from icons.store.verify import verify

RNG = np.random.default_rng(0)
K = 8
ROWS = {"train": RNG.normal(size=(24, K)), "gqa": RNG.normal(size=(6, K))}


def fill(store: GradientStore, unit: int, rows: np.ndarray, failed: int | None = None) -> None:
    part = np.asarray(store.partition.unit_rows(unit))
    bad = part == (-1 if failed is None else failed)
    gradient = np.where(bad[:, None], 0, rows[part]).astype(np.float32)
    number = np.where(bad, np.nan, 1).astype(np.float32)
    values = {"norm": number, "loss": number, "tokens": np.where(bad, 0, 3).astype(np.int32)}
    store.write_unit(unit, {"gradient": gradient, **values, "status": np.where(bad, 4, 1).astype(np.uint8)})


@pytest.fixture
def scoring(tmp_path: Path) -> Scoring:
    """24 rows in 6 units; of the task's 6 rows one has failed."""
    for name, rows in ROWS.items():
        manifest = {"data": {"fingerprint": name}, "projector": {"kind": "count_sketch", "dim": K, "seed": 0}}
        path, size = tmp_path / f"{name}.zarr", 4 if name == "train" else 6
        store = GradientStore.create(path, num_rows=len(rows), dim=K, chunk_rows=size, manifest=manifest)
        for unit in range(store.partition.num_units):
            fill(store, unit, rows, 2 if name == "gqa" else None)
    tasks = {"gqa": [str(tmp_path / "gqa.zarr")]}
    return Scoring([str(tmp_path / "train.zarr")], tasks, str(tmp_path / "scores.zarr"), chunk_rows=4)


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def retry(scoring: Scoring) -> None:
    fill(GradientStore.open(scoring.tasks["gqa"][0], "r+"), 0, ROWS["gqa"])


def check(scoring: Scoring) -> None:
    found = ScoreStore.open(scoring.out)
    expected = influence(GradientStore.open(scoring.train[0]), {"gqa": GradientStore.open(scoring.tasks["gqa"][0])})
    assert found.missing() == [] and np.array_equal(found.influence[:], expected.numpy())


def test_rows_that_change_while_they_are_scored_are_an_error_and_leave_no_score(
    scoring: Scoring, fabric: Fabric
) -> None:
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if done == 12:
            retry(scoring)

    with pytest.raises(ValueError, match=r"gqa.zarr: its rows have changed while they were scored; run the same line"):
        scoring.run(fabric, advance)
    assert len(ScoreStore.open(scoring.out).missing()) == 6
    scoring.run(fabric)
    check(scoring)


def test_no_score_is_made_of_a_store_that_another_run_has_replaced_meanwhile(scoring: Scoring, fabric: Fabric) -> None:
    seen = 0

    def advance(rows: int) -> None:
        nonlocal seen
        seen += rows
        if seen == 12:
            discard(Storage(scoring.train[0], "r+"))
            other = {"projector": {"kind": "count_sketch", "dim": K, "seed": 7}}
            new = GradientStore.create(scoring.train[0], num_rows=24, dim=K, chunk_rows=4, manifest=other)
            for unit in range(6):
                fill(new, unit, -ROWS["train"])

    expected = replace(scoring, out=f"{scoring.out}.before").run(fabric).influence[:8]
    with pytest.raises(ValueError, match=r"train.zarr: another run has replaced it, with other settings, meanwhile; "):
        scoring.run(fabric, advance)
    store = ScoreStore.open(scoring.out)
    assert store.missing() == [2, 3, 4, 5] and np.array_equal(store.influence[:8], expected)


def test_a_unit_that_somebody_takes_away_meanwhile_is_an_error(scoring: Scoring, fabric: Fabric) -> None:
    scoring.run(fabric)
    first, last = (Path(scoring.out) / "status" / "c" / unit for unit in "05")
    last.unlink()
    with pytest.raises(ValueError, match=r"scores.zarr: 1 of 6 units are missing, for example unit 0: somebody"):
        scoring.run(fabric, lambda rows: first.unlink(missing_ok=True))
    scoring.run(fabric)
    check(scoring)


def test_scores_are_not_computed_anew_beside_a_run_that_uses_the_former_rows(scoring: Scoring, fabric: Fabric) -> None:
    scores = scoring.run(fabric)
    retry(scoring)
    other = Leases(ScoreStore.open(scores.path, "r+").storage)
    assert other.acquire(3)
    with pytest.raises(ValueError, match=r"rows of task gqa have changed, and process \d+ on .* is still scoring with"):
        scoring.run(fabric)
    assert ScoreStore.open(scores.path).missing() == []
    other.close()
    scoring.run(fabric)
    check(scoring)


def test_scores_of_which_nobody_noted_what_they_were_made_from_are_computed_anew(
    scoring: Scoring, fabric: Fabric
) -> None:
    store = ScoreStore.open(scoring.run(fabric).path, "r+")
    task = [
        {name: value for name, value in source.items() if name != STATUSES} for source in store.manifest["tasks"]["gqa"]
    ]
    store.amend(tasks={"gqa": task})
    said: list[str] = []
    scoring.run(fabric, say=said.append)
    assert [line.partition(": ")[2] for line in said] == [
        "the rows of gqa may have changed (an earlier version did not note their statuses): 6 units to compute anew"
    ]
    check(scoring)


@pytest.mark.slow
def test_runs_at_once_make_one_whole_store_and_the_last_to_end_says_that_it_is(scoring: Scoring) -> None:
    folder, driver = Path(scoring.out).parent, Path(__file__).parent / "score_driver.py"
    ran = subprocess.run([sys.executable, driver, folder], capture_output=True, text=True, timeout=240)
    lines = ran.stdout.splitlines()
    ends = [line.split()[2:] for line in lines if line.startswith("ended with")]
    assert ran.returncode == 0 and len(ends) == 5, ran.stderr
    assert all("0" in end and set(end) <= {"0", "1"} for end in ends), ran.stdout + ran.stderr
    said = [line for line in lines if not line.startswith("ended with")]
    assert all("another run is computing" in line for line in said), said
    for number in range(5):
        check(replace(scoring, out=str(folder / f"scores-{number}.zarr")))
        assert list(verify(ScoreStore.open(folder / f"scores-{number}.zarr"))) == []
    assert not [
        path for path in folder.rglob("*") if path.is_file() and (".partial" in path.name or "lease" in str(path))
    ]
