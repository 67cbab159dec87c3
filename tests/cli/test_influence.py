import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from icons.batch import Status
from icons.cli import main
from icons.consensus.pairs import Pairs
from icons.scores import influence
from icons.store import GradientStore, ScoreStore

RNG = np.random.default_rng(0)
K = 32
ROWS = {"train": RNG.normal(size=(90, K)), "gqa": RNG.normal(size=(7, K)), "pope": RNG.normal(size=(12, K))}


def store(path: Path, rows: np.ndarray, failed: tuple[int, ...] = (), seed: int = 0) -> GradientStore:
    manifest = {"projector": {"kind": "count_sketch", "dim": K, "seed": seed}, "data": {"fingerprint": path.name}}
    made = GradientStore.create(path, num_rows=len(rows), dim=K, chunk_rows=8, manifest=manifest)
    for unit in range(made.partition.num_units):
        write(made, unit, rows, failed)
    return made


def write(made: GradientStore, unit: int, rows: np.ndarray, failed: tuple[int, ...] = ()) -> None:
    part = list(made.partition.unit_rows(unit))
    status = np.array([Status.IMAGE_MISSING if row in failed else Status.DONE for row in part], np.uint8)
    ok = status == Status.DONE
    fields = {"norm": 2.0, "loss": 0.5}
    scalars = {name: np.where(ok, value, np.nan).astype(np.float32) for name, value in fields.items()}
    gradient = np.where(ok[:, None], rows[part], 0).astype(np.float32)
    made.write_unit(unit, {"gradient": gradient, **scalars, "tokens": 3 * ok.astype(np.int32), "status": status})


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    for name, rows in ROWS.items():
        store(tmp_path / f"{name}.zarr", rows, failed=(4, 50) if name == "train" else ())
    tasks = [word for name in ("gqa", "pope") for word in ("--task", f"{name}={tmp_path / name}.zarr")]
    out = ["--out", str(tmp_path / "scores.zarr"), "--accelerator", "cpu"]
    return ["influence", "--train", str(tmp_path / "train.zarr"), *tasks, *out]


def expected(folder: Path) -> np.ndarray:
    stores = {name: GradientStore.open(folder / f"{name}.zarr") for name in ROWS}
    return influence(stores["train"], {name: stores[name] for name in ("gqa", "pope")}).numpy()


def test_the_score_store_holds_influence_errors_and_what_the_baselines_need(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line) == 0
    scores = ScoreStore.open(tmp_path / "scores.zarr")
    assert np.array_equal(scores.influence[:], expected(tmp_path), equal_nan=True)
    assert (
        np.flatnonzero(np.isnan(scores.stderr[:, 0])).tolist()
        == [4, 50]
        == np.flatnonzero(scores.status[:] != 1).tolist()
    )
    assert scores.tasks == ["gqa", "pope"] and scores.manifest["num_validation"] == [7, 12]
    assert np.nanmax(scores.arrays["norm"][:]) == 2 and scores.arrays["tokens"][:].sum() == 3 * 88
    assert "88 rows scored on 2 tasks, 2 failed" in capsys.readouterr().out


def test_units_that_are_missing_or_were_computed_again_are_done_and_no_others(line: list[str], tmp_path: Path) -> None:
    line += ["--chunk-rows", "16"]
    assert main(line) == 0
    scores = ScoreStore.open(tmp_path / "scores.zarr", mode="r+")
    assert scores.partition.num_units == 6
    marked = scores.influence[:]
    marked[:] = 7
    scores.influence[:] = marked
    write(GradientStore.open(tmp_path / "train.zarr", mode="r+"), 4 // 8, ROWS["train"])  # row 4 no longer fails
    assert main(line) == 0
    again = ScoreStore.open(tmp_path / "scores.zarr").influence[:]
    assert np.array_equal(again[:16], expected(tmp_path)[:16]) and (again[16:] == 7).all()


def test_pairs_and_strongest_validation_rows_are_kept(line: list[str], tmp_path: Path) -> None:
    assert main([*line, "--pairwise", "--top-pairs", "3"]) == 0
    scores = ScoreStore.open(tmp_path / "scores.zarr")
    pairs = scores.arrays["pairwise_gqa"][:]
    done = scores.status[:] == 1
    assert pairs.shape == (90, 7) and np.allclose(pairs[done].mean(axis=1), scores.influence[:, 0][done], atol=1e-6)
    rows, values = scores.arrays["top_rows_gqa"][:], scores.arrays["top_influence_gqa"][:]
    assert np.array_equal(rows[done], np.argsort(-pairs[done], axis=1)[:, :3])
    assert np.array_equal(values[done], np.take_along_axis(pairs[done], rows[done].astype(int), axis=1))
    assert (rows[~done] == -1).all() and np.isnan(values[~done]).all()


def test_groups_and_checkpoints_come_from_the_command_line(line: list[str], tmp_path: Path) -> None:
    folder = str(tmp_path)
    out = f"{folder}/two.zarr"
    words = ["influence", "--train", f"{folder}/train.zarr", "--train", f"{folder}/train.zarr", "--out", out]
    words += ["--task", f"a={folder}/gqa.zarr,{folder}/gqa.zarr", "--task", f"b={folder}/pope.zarr,{folder}/pope.zarr"]
    words += ["--weights", "0.5", "--weights", "1.5", "--group", "both=a,b", "--reduce", "max", "--accelerator", "cpu"]
    assert main(words) == 0
    found = ScoreStore.open(out)
    assert found.tasks == ["both"]
    assert np.allclose(found.influence[:, 0], 2 * expected(tmp_path).max(axis=1), equal_nan=True, atol=1e-6)


CASES = [
    (["--task", "vqa"], "--task vqa: expected NAME=VALUE"),
    (["--task", "gqa=x.zarr"], "gqa is given twice"),
    (["--top-pairs", "-1"], "--top-pairs -1: expected 0 or more"),
]


@pytest.mark.parametrize(("words", "message"), CASES)
def test_wrong_options_are_said_in_one_line(
    line: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line, *words]) == 1
    assert message in capsys.readouterr().err


def test_a_store_of_other_settings_is_not_gone_on_with(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line) == 0
    assert main([*line, "--normalize", "none"]) == 1
    assert "normalize: the score store" in capsys.readouterr().err
    store(tmp_path / "other.zarr", ROWS["gqa"], seed=1)
    assert main([*line, "--task", f"vqa={tmp_path}/other.zarr"]) == 1
    assert "projector" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_and_a_killed_run_give_the_same_bits(line: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "icons", *line, "--chunk-rows", "8"]
    killed = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    status = tmp_path / "scores.zarr" / "status" / "c" / "0"
    while not status.exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run([*words, "--devices", "2"], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=120)
    scores = ScoreStore.open(tmp_path / "scores.zarr")
    torch.set_num_threads(1)
    assert scores.missing() == []
    assert np.array_equal(scores.influence[:], expected(tmp_path), equal_nan=True)


def test_axes_that_are_dropped_are_dropped_for_rules_that_read_single_validation_rows_too(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line, "--drop-axes", "2"]) == 0
    scores = ScoreStore.open(tmp_path / "scores.zarr")
    assert scores.manifest["drop_axes"] == 2
    whole = np.nan_to_num(scores.influence[:])
    with Pairs.of_store(scores) as pairs:
        for place in range(2):
            weights = np.where(pairs.task == place, pairs.share, 0)
            assert pairs.weighted(weights) == pytest.approx(whole[:, place], abs=1e-3)  # products are in float16
    assert np.abs(whole - np.nan_to_num(expected(tmp_path))).max() > 0.05
    assert main(line) == 1  # the same store without: other scores
    assert "drop_axes" in capsys.readouterr().err


def test_subspaces_come_from_the_command_line_and_have_no_error_bars(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line, "--subspace", "0.9"]) == 0
    assert "unknown" in capsys.readouterr().out
    scores = ScoreStore.open(tmp_path / "scores.zarr")
    assert scores.manifest["subspace"] == 0.9 and np.isnan(scores.stderr[:]).all()
    whole = np.nan_to_num(scores.influence[:])
    with Pairs.of_store(scores) as pairs:  # within the same subspaces
        for place in range(2):
            weights = np.where(pairs.task == place, pairs.share, 0)
            assert pairs.weighted(weights) == pytest.approx(whole[:, place], abs=1e-3)


def test_a_task_whose_failed_rows_were_retried_has_every_score_computed_anew(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tmp_path / "gqa.zarr")
    task = store(tmp_path / "gqa.zarr", ROWS["gqa"], failed=(2, 5))
    line += ["--chunk-rows", "16"]
    assert main(line) == 0
    capsys.readouterr()
    write(GradientStore.open(task.path, mode="r+"), 0, ROWS["gqa"], failed=(5,))
    assert main(line) == 0
    assert "scores.zarr: the rows of gqa have changed: 6 units to compute anew" in capsys.readouterr().out
    scores = ScoreStore.open(tmp_path / "scores.zarr")
    assert np.array_equal(scores.influence[:], expected(tmp_path), equal_nan=True)
    assert scores.manifest["num_validation"] == [6, 12]
    assert main(line) == 0 and "anew" not in capsys.readouterr().out
