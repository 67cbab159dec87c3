"""`icons validate --rule` trains on each rule's selection once, pairs pools and seeds, and writes a table."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from icons.cli import command_line as cli
from icons.consensus import select
from icons.store import ScoreStore

DATA = Path(__file__).parents[1] / "data" / "original_llava"
ROWS = 6
pytestmark = pytest.mark.filterwarnings("ignore")


def make_pool(folder: Path, number: int = 0, num_rows: int = ROWS) -> tuple[Path, Path]:
    """The three tiny records twice, with random scores for two tasks."""
    folder.mkdir(exist_ok=True)
    data, path = folder / f"pool-{number}.json", folder / f"scores-{number}.zarr"
    data.write_text(json.dumps(json.loads((DATA / "data.json").read_text()) * 2))
    store = ScoreStore.create(path, num_rows=num_rows, tasks=["x", "y"])
    drawn = np.random.default_rng(number).standard_normal((num_rows, 2)).astype(np.float32)
    store.write_unit(0, drawn, np.zeros_like(drawn), np.ones(num_rows, np.uint8))
    return data, path


def run(pool: tuple[Path, Path], out: Path, *more: object) -> int:
    words = ["--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip", "--images", DATA]
    words += ["--mm-projector", DATA / "mm_projector.bin", "--data", pool[0], "--scores", f"ours={pool[1]}"]
    words += ["--task", f"tiny={DATA / 'data.json'}:{DATA}", "--lora-rank", 2, "--batch-size", 4, "--fraction", 0.5]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--out", out]
    return cli.main(["validate", *map(str, [*words, *more])])


def test_trains_on_each_selection_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, out = make_pool(tmp_path), tmp_path / "out"
    assert run(pool, out, "--rule", "mean") == 0
    assert "One pair of trainings tells nothing of chance" in capsys.readouterr().out.replace("\n", " ")
    assert {path.name for path in out.iterdir() if path.is_dir()} == {
        "random-0.5-0", "vote-0.5-0", "mean-0.5-0", "status"
    }  # fmt: skip
    store = ScoreStore.open(pool[1])
    for rule in ("random", "vote", "mean"):
        assert np.load(out / f"{rule}-0.5-0" / "rows.npy").tolist() == select(store, 0.5, rule).rows.tolist()
    content = json.loads((out / "bakeoff.json").read_text())
    measured = json.loads((out / "mean-0.5-0" / "fit" / "icons.json").read_text())["accuracy"]["after"]["tiny"]
    assert content["tables"][0]["rows"][2][1] == pytest.approx(100 * measured, abs=1e-3)

    monkeypatch.setattr("icons.cli.trainings.retrain", forbidden)
    assert run(pool, out, "--rule", "mean") == 0
    assert run(pool, out, "--rule", "mean", "--measure", "loss") == 0
    reached = json.loads((out / "bakeoff.json").read_text())["tables"][0]["rows"][2][1]
    assert reached == pytest.approx(json.loads((out / "mean-0.5-0" / "losses.json").read_text())["tiny"], abs=1e-3)


def forbidden(**_: object) -> int:
    raise AssertionError("trained again")


def accuracy_of(seed: int, data: Path) -> float:
    """A made-up accuracy that depends on the rows and the seed."""
    return (len(data.parent.parts[-1]) + 3 * seed) % 7 / 10


def pretended(data: Path, out: Path, seed: int, **_: Any) -> int:
    """In place of a training: a folder with its measurements."""
    out.mkdir(parents=True)
    accuracy = {"tiny": accuracy_of(seed, data)}
    (out / "icons.json").write_text(json.dumps({"accuracy": {"after": accuracy}, "losses": {"after": accuracy}}))
    return 0


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icons.cli.trainings.retrain", pretended)
    monkeypatch.setattr(
        "icons.validation.retraining.open_warmup",
        lambda folder: SimpleNamespace(
            facts=SimpleNamespace(losses=SimpleNamespace(**json.loads((folder / "icons.json").read_text())["losses"]))
        ),
    )


@pytest.mark.usefixtures("pretending")
def test_pairs_are_pools_where_there_are_several(tmp_path: Path) -> None:
    pool, out = make_pool(tmp_path), tmp_path / "out"
    more = [
        f"{name}={make_pool(tmp_path, number)[0]},{tmp_path / f'scores-{number}.zarr'}"
        for number, name in enumerate("bc", 1)
    ]
    assert run(pool, out, "--rule", "max", "--rule", "rank", "--seeds", 2, "--pool", more[0], "--pool", more[1]) == 0
    assert len(list(out.glob("*/*/rows.npy"))) == 3 * 4 * 2
    assert {path.name for path in out.iterdir()} == {".icons.json", "ours", "b", "c", "bakeoff.json"}
    content = json.loads((out / "bakeoff.json").read_text())
    assert [row[0] for row in content["rows"]] == ["vote", "max", "rank"]
    assert "3 pools, 2 seeds each" in content["text"]
    assert "over 3 pools" in content["text"]
    expected = {}
    for rule in ("random", "max"):
        folders = [out / name / f"{rule}-0.5-{seed}" for name in ("ours", "b", "c") for seed in (0, 1)]
        values = [accuracy_of(int(folder.name[-1]), folder / "data.json") for folder in folders]
        expected[rule] = 100 * np.mean(values)
    assert content["rows"][1][1][0] == pytest.approx(expected["max"] - expected["random"], abs=1e-3)


@pytest.mark.usefixtures("pretending")
def test_random_rows_are_drawn_anew_for_each_seed_and_shards_share_the_work(tmp_path: Path) -> None:
    pool, out = make_pool(tmp_path), tmp_path / "out"
    for shard in ("0/2", "1/2"):
        assert run(pool, out, "--rule", "mean", "--seeds", 3, "--shard", shard) == 0
        assert not (out / "bakeoff.json").exists()
    drawn = [np.load(out / f"random-0.5-{seed}" / "rows.npy").tolist() for seed in range(3)]
    assert drawn == [select(ScoreStore.open(pool[1]), 0.5, "random", seed=seed).rows.tolist() for seed in range(3)]
    assert len(list(out.glob("*/losses.json"))) == 9
    assert run(pool, out, "--rule", "mean", "--seeds", 3) == 0
    assert "over 3 seeds" in json.loads((out / "bakeoff.json").read_text())["text"]


def test_a_model_that_another_process_trains_is_waited_for_by_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("icons.cli.bakeoff.side_by_side", lambda *_: 0)
    assert run(make_pool(tmp_path), tmp_path / "out", "--rule", "vote") == 75
    assert "2 models are still being trained by other processes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rule", "worst"], "method 'worst': expected one of vote,"),
        (["--rule", "mean", "--fraction", 0.01], "--rule random --fraction 0.01: selects none of 6 rows; expected one"),
        (
            ["--rule", "mean", "--scores", "b=b.zarr"],
            "--rule: got 2 --scores; expected one, which every rule selects by",
        ),
        (["--rule", "mean", "--pool", "b=b.json"], "--pool b=b.json: expected NAME=DATA,SCORES or NAME=DATA,SCORES,"),
        (["--rule", "mean", "--pool", "ours=a,b"], "--pool ours: expected a name of its own, of letters, digits"),
        ([], "--fraction and --pool: belong to --rule, which is not given"),
    ],
)
def test_refuses_before_anything_is_trained(
    more: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(make_pool(tmp_path), tmp_path / "out", *more) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("finished", "message"),
    [(True, "4 rows, "), (False, "lacks 1 unit; finish the store first")],
)
def test_refuses_scores_of_something_else(
    finished: bool, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = make_pool(tmp_path, num_rows=4)
    if not finished:
        ScoreStore.create(tmp_path / "unfinished.zarr", num_rows=ROWS, tasks=["x"])
        pool = (pool[0], tmp_path / "unfinished.zarr")
    assert run(pool, tmp_path / "out", "--rule", "mean") == 1
    assert message in capsys.readouterr().err
