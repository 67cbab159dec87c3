"""`icons validate` trains each subset once, resumes, and writes a table that the report can read."""

import json
from pathlib import Path

import numpy as np
import pytest

from icons.cli import command_line as cli
from icons.cli.validate import provenance
from icons.datamodules.records import open_records
from icons.report.comparison import validation
from icons.store import ScoreStore

DATA = Path(__file__).parents[1] / "data" / "original_llava"
ROWS = 6
pytestmark = pytest.mark.filterwarnings("ignore")


def scores(path: Path, num_rows: int = ROWS, task: str = "tiny", finished: bool = True) -> Path:
    """A score store of one task; scores fall from the first row to the last."""
    store = ScoreStore.create(path, num_rows=num_rows, tasks=[task], extra={"loss": ("float32", [])})
    if finished:
        falling = np.linspace(1, 0, num_rows, dtype=np.float32)
        done = np.ones(num_rows, np.uint8)
        store.write_unit(0, falling[:, None], np.zeros((num_rows, 1), np.float32), done, loss=falling)
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """The three tiny records twice; the last two are marked as bad."""
    records = json.loads((DATA / "data.json").read_text()) * 2
    marked = [{**record, "provenance": "wrong" if row > 3 else "right"} for row, record in enumerate(records)]
    (tmp_path / "pool.json").write_text(json.dumps(marked))
    return tmp_path / "pool.json"


def run(pool: Path, store: Path, out: Path, *more: object) -> int:
    words = ["--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip", "--images", DATA]
    words += ["--mm-projector", DATA / "mm_projector.bin", "--data", pool, "--scores", f"ours={store}", "--out", out]
    words += ["--task", f"tiny={DATA / 'data.json'}:{DATA}", "--subsets", 3, "--lora-rank", 2, "--batch-size", 4]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    return cli.main(["validate", *map(str, [*words, *more])])


@pytest.mark.slow
def test_trains_every_subset_once_and_writes_the_table(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, out = scores(tmp_path / "scores.zarr"), tmp_path / "out"
    more = ["--counterfactual", 0.34, "--counterfactual-seeds", 2]
    assert run(pool, store, out, *more) == 0
    names = {"all", "without-top", "without-bottom", "without-random"}
    names |= {f"{name}-1" for name in names} | {"subset-000", "subset-001", "subset-002", "status"}
    assert {path.name for path in out.iterdir() if path.is_dir()} == names
    written = (out / "validation.json").read_bytes()

    section = validation(out / "validation.json")
    assert section.title == "Does influence predict?"
    content = json.loads(written)
    assert content["columns"] == ["method", "LDS", "bad below good (AUC)", "of the bad, in the lowest 20 %"]
    assert [row[0] for row in content["rows"]] == ["ours", "random", "loss"]
    assert content["rows"][0][2] == [1.0, 1.0, 1.0]  # every bad row scores below every good one
    table = content["counterfactual"]
    assert table["columns"][1:] == ["without the top", "without the bottom", "without random rows"]
    assert [row[0] for row in table["rows"]] == ["tiny", "mean"]
    losses = [[json.loads((out / f"{name}{seed}" / "losses.json").read_text())["tiny"] for seed in ("", "-1")]
              for name in ("without-top", "all")]  # fmt: skip
    assert table["rows"][0][1][0] == pytest.approx(np.mean(losses[0]) - np.mean(losses[1]), abs=1e-4)
    assert [json.loads((out / name / "data.json").read_text()) for name in ("without-top", "without-bottom")] == [
        json.loads(pool.read_text())[2:],
        json.loads(pool.read_text())[:-2],
    ]
    random = [np.load(out / f"without-random{seed}" / "rows.npy") for seed in ("", "-1")]
    assert not np.array_equal(*random)  # drawn anew for each seed

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("icons.cli.trainings.retrain", forbidden)
    assert run(pool, store, out, *more) == 0
    assert (out / "validation.json").read_bytes() == written


@pytest.mark.slow
def test_several_seeds_per_subset_are_averaged(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, out = scores(tmp_path / "scores.zarr"), tmp_path / "out"
    assert run(pool, store, out, "--counterfactual", 0, "--seeds", 2) == 0
    assert len(list(out.glob("subset-00?-1/losses.json"))) == 3
    capsys.readouterr()
    assert run(pool, store, out, "--counterfactual", 0, "--epochs", 3) == 1
    assert "holds trainings with epochs 1, now it is 3; give another folder" in capsys.readouterr().err
    assert run(pool, store, out, "--seeds", 0) == 1
    assert "--seeds 0, --counterfactual-seeds 3: expected at least 1 training of each" in capsys.readouterr().err


@pytest.mark.slow
def test_two_workers_measure_what_one_does(pool: Path, tmp_path: Path) -> None:
    store = scores(tmp_path / "scores.zarr")
    for out, workers in (("one", 1), ("two", 2)):
        assert run(pool, store, tmp_path / out, "--counterfactual", 0, "--workers", workers) == 0
    files = [(tmp_path / out / "validation.json").read_bytes() for out in ("one", "two")]
    assert files[0] == files[1]


def test_a_model_that_another_process_trains_is_waited_for_by_the_user(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("icons.cli.validate.side_by_side", lambda *_: 0)
    assert run(pool, scores(tmp_path / "scores.zarr"), tmp_path / "out", "--counterfactual", 0) == 75
    assert "3 models are still being trained by other processes" in capsys.readouterr().out


@pytest.mark.slow
def test_shards_train_their_share_and_leave_the_table_to_the_last_call(pool: Path, tmp_path: Path) -> None:
    store, out = scores(tmp_path / "scores.zarr"), tmp_path / "out"
    trained = []
    for shard in ("0/2", "1/2"):
        assert run(pool, store, out, "--counterfactual", 0, "--shard", shard) == 0
        assert not (out / "validation.json").exists()
        trained.append(len(list(out.glob("*/losses.json"))))
    assert trained in ([1, 3], [2, 3])
    assert run(pool, store, out, "--counterfactual", 0) == 0
    assert "counterfactual" not in json.loads((out / "validation.json").read_text())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"task": "other"}, "--scores ours: has no task tiny; it has other: name tasks alike"),
        ({"num_rows": 5}, "--scores ours: 5 rows, the data file has 6; expected the same file"),
        ({"finished": False}, "--scores ours: lacks 1 unit; finish the store first"),
    ],
)
def test_refuses_scores_of_something_else(
    made: dict[str, object], message: str, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = scores(tmp_path / "scores.zarr", **made)  # type: ignore[arg-type]
    assert run(pool, store, tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_records_are_told_by_a_field_inside_another(tmp_path: Path) -> None:
    records = [{"meta": {"kind": "wrong"}}, {"meta": {"kind": "right"}}, {"meta": "wrong"}, "no object", {}]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(records))
    assert provenance(open_records(file), "meta.kind").tolist() == ["wrong", "right", "", "", ""]
