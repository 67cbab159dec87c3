"""Factors by jobs that do not know of each other: the bytes that one job writes; and what is said of each before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from icons.cli import main
from icons.cli.estimate.run_estimate import size
from icons.gradients.covariances import CovarianceSums
from icons.kronecker import KroneckerFactors
from icons.modules.factor_parts import FactorParts
from icons.modules.factor_pass import FactorPass

DATA = Path(__file__).parents[1] / "data" / "original_llava"
MODEL = [
    "--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip", "--mm-projector", DATA / "mm_projector.bin",
    "--adapter", DATA / "llava-tiny-lora", "--images", DATA, "--trainer.accelerator", "cpu",
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 rows, one of which cannot be read."""
    folder, rows = tmp_path_factory.mktemp("data"), json.loads((DATA / "data.json").read_text()) * 2
    rows[4] = {**rows[4], "image": "nowhere.png"}
    (folder / "data.json").write_text(json.dumps([{**row, "id": str(at)} for at, row in enumerate(rows)]))
    return folder / "data.json"


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    """What one job writes."""
    torch.set_num_threads(1)  # before any test's own fixture does
    assert factors(data, data.parent / "whole.safetensors") == 0
    return data.parent / "whole.safetensors"


def factors(data: Path, out: Path, *words: object) -> int:
    return main(["factors", *map(str, [*MODEL, "--data", data, "--batch-size", 2, "--out", out, *words])])


def parts_of(out: Path) -> list[str]:
    return sorted(path.name for path in out.with_name(out.name + ".parts").glob("[0-9]*"))


def test_shards_write_what_one_job_writes(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f.safetensors"
    assert factors(data, out, "--shard", "2/3") == 0
    assert parts_of(out) == ["02.safetensors", "05.safetensors"]
    said = " ".join(capsys.readouterr().out.split())
    assert "share 2/3 is done; 4 parts of other shares (0, ...) are missing" in said and not out.exists()
    assert factors(data, out, "--shard", "7/8") == 0  # more shares than parts: nothing to do
    assert factors(data, out, "--shard", "0/3") == 0
    assert factors(data, out, "--shard", "1/3") == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not out.with_name("f.safetensors.parts").exists()
    assert factors(data, out, "--shard", "0/3") == 0  # they are there


def test_a_shard_that_finds_all_parts_and_no_factors_writes_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(KroneckerFactors, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
        assert factors(data, out) == 1
    assert len(parts_of(out)) == 6
    monkeypatch.setattr(FactorPass, "predict_step", lambda *_: pytest.fail("computed again"))
    assert factors(data, out, "--shard", "1/3") == 0
    assert KroneckerFactors.load(out).rows == 5


def test_parts_of_another_seed_are_not_added_up(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "f.safetensors"
    assert factors(data, out, "--shard", "0/2", "--seed", 1) == 0
    assert factors(data, out, "--shard", "1/2") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "00.safetensors: was there and is gone, or was made from something else; expected all parts from the" in said
    assert not out.exists()


def test_two_shards_that_finish_at_once_leave_the_factors(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one writes them, and takes the parts away, while this one reads."""
    out = tmp_path / "f.safetensors"
    assert factors(data, out, "--shard", "0/2") == 0
    read = FactorParts.read

    def raced(self: FactorParts, part: int) -> Any:
        if part == 3 and len(parts_of(out)) == 6:
            out.write_bytes(whole.read_bytes())
            self.remove()
        return read(self, part)

    monkeypatch.setattr(FactorParts, "read", raced)
    assert factors(data, out, "--shard", "1/2") == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shard", "2/2"], "shard '2/2': expected I/N with 0 <= I < N"),
        (["--shard", "0/2", "--overwrite"], "--overwrite: together with --shard each job would take away"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert factors(DATA / "data.json", tmp_path / "f.safetensors", *words) == 1
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_last_run_to_end_takes_the_parts_away_and_one_of_other_settings_is_kept_out(tmp_path: Path) -> None:
    one, same, other = (FactorParts(tmp_path / "f.safetensors", {"seed": seed}) for seed in (1, 1, 2))
    one.enter()
    same.enter()
    same.write(0, CovarianceSums(), "")
    with pytest.raises(ValueError, match=r"f.safetensors.parts: another run is making parts of other settings there; "):
        other.enter()
    one.remove()
    assert same.read(0) is not None, "the other run at it needs them"
    with pytest.raises(ValueError, match=r"another run is making parts of other settings there; wait until it has end"):
        other.enter()
    same.leave()
    other.enter()
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_was_written_is_read(tmp_path: Path) -> None:
    parts = FactorParts(tmp_path / "f.safetensors", {"seed": 1})
    sums = CovarianceSums({"w": torch.eye(2).double()}, {"w": torch.ones(3).double()}, rows=4, left_out=1)
    parts.enter()
    parts.write(7, sums, "row 3: no image")
    found = parts.read(7)
    assert found is not None and found[1] == "row 3: no image"
    assert torch.equal(found[0].left["w"], torch.eye(2).double()) and (found[0].rows, found[0].left_out) == (4, 1)
    assert parts.read(8) is None and FactorParts(tmp_path / "f.safetensors", {"seed": 2}).read(7) is None
    parts.remove()
    parts.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_the_bytes_that_are_written_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f.safetensors"
    assert factors(data, out, "--width", 8, "--shard", "0/3", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "dry run: nothing was written" in said and list(tmp_path.iterdir()) == []
    lines = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in said.splitlines() if "│" in line}
    assert factors(data, out, "--width", 8) == 0
    held = KroneckerFactors.load(out).num_bytes
    assert lines["writes factors"] == size(held)
    assert lines["writes parts, until all are there"] == size(2 * held * 6)
    assert lines["rows per rank"] == "2" and lines["rows"] == "6"
