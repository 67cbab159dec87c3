"""The study of rules at the quick demo's size: its cheap fine-tune is the real one, and it goes on where it stopped."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from icons.cli import call
from icons.cli.demo import QUICK

pytestmark = pytest.mark.filterwarnings("ignore")
PLAN = "easy-vqa 2 vote,filtered_random,unheard_of 0.2 0,1\neasy-vqa 2 coverage@drop1 0.2 0\n"


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The scripts import each other from their own folder."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    import study_selection

    yield study_selection
    sys.path.pop(0)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, scripts: Any) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "plan").write_text(PLAN)
    command = [sys.executable, scripts.__file__, *words(folder)]  # jaxtyping, in this process, knows pixels alone
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def words(folder: Path) -> list[str]:
    return ["--out", str(folder), "--plan", str(folder / "plan"), "--quick"]


def test_a_fine_tune_is_that_of_the_warmup_command_to_the_last_bit(out: Path) -> None:
    folder = out / "easy-vqa" / "02"
    found = json.loads((folder / "results" / "vote-0.2-1.json").read_text())
    records = json.loads((folder / "pool.json").read_text())
    (out / "selected.json").write_text(json.dumps([records[row] for row in found["rows"]]))
    status = call(
        "warmup",
        model=folder / "start", data=out / "selected.json", images=folder / "images", out=out / "tuned", seed=1,
        task=[f"{task}={folder / f'{task}_test.json'}:{folder / 'images'}" for task in found["accuracy"]],
        epochs=QUICK.epochs, batch_size=QUICK.batch_size, learning_rate=QUICK.learning_rate, held_out=0.0, min_rows=1,
        projector_learning_rate=QUICK.projector_learning_rate, lora_rank=QUICK.lora_rank,
        lora_alpha=2.0 * QUICK.lora_rank, trainer={"accelerator": "cpu", "enable_progress_bar": False},
    )  # fmt: skip
    assert status == 0
    measured = json.loads((out / "tuned" / "icons.json").read_text())
    assert found["accuracy"] == measured["accuracy"]["after"]
    assert found["loss"] == measured["losses"]["after"]


def test_the_table_has_a_row_per_fine_tune_and_says_what_was_selected(out: Path) -> None:
    rows = list(csv.DictReader((out / "study_selection.csv").open()))
    assert [(row["rule"], row["seed"]) for row in rows] == [
        ("coverage@drop1", "0"), ("filtered_random", "0"), ("filtered_random", "1"), ("vote", "0"), ("vote", "1"),
    ]  # fmt: skip
    results = {name: json.loads((out / "easy-vqa/02/results" / f"{name}-0.2-0.json").read_text()) for name in ("vote",)}
    records = json.loads((out / "easy-vqa/02/pool.json").read_text())
    chosen = [records[row] for row in results["vote"]["rows"]]
    shares = {"yes": sum(r["conversations"][1]["value"] == "yes" for r in chosen) / len(chosen)}
    shares["wrong"] = sum(r["provenance"] == "wrong" for r in chosen) / len(chosen)
    assert {name: float(rows[3][name]) for name in shares} == pytest.approx(shares, abs=1e-4), "four places are kept"
    assert len(results["vote"]["rows"]) == int(rows[3]["rows"]) == 32


def test_rows_that_are_drawn_differ_by_seed_and_others_do_not(out: Path) -> None:
    names = {path.name for path in (out / "easy-vqa/02/selections").iterdir()}
    drawn = {"filtered_random-0.2-0.json", "filtered_random-0.2-1.json"}
    assert names == {"vote-0.2-0.json", "coverage@drop1-0.2-0.json"} | drawn


def test_it_goes_on_where_it_was_stopped_and_takes_selections_made_elsewhere(
    out: Path, tmp_path: Path, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(out, tmp_path / "study")
    folder, done = out / "easy-vqa" / "02", []
    (folder / "selections" / "unheard_of-0.2-0.json").write_text(json.dumps([0, 5, 7]))
    monkeypatch.setattr(scripts, "fine_tune", lambda *given: done.append(given[2].tolist()) or MEASURED)
    monkeypatch.setattr(sys, "argv", ["study", *words(out)])
    scripts.main()
    assert done == [[0, 5, 7], [0, 5, 7]]


MEASURED = {"accuracy": {"a": 1.0}, "loss": {"a": 0.0}, "said_yes": 0.5, "right_yes": 0.5}
