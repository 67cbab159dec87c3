"""Whenever the power goes, the same line then ends with the store that an undisturbed run makes, byte for byte.

`ICONS_CUTS=200` tries that many moments.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.fabric import Fabric
from power_cuts import Recording
from torch.utils.data import DataLoader

import icons.store.folder
from icons.cli import main
from icons.consensus.selection_file import open_selection
from icons.modules.fit import check_resumable
from icons.modules.fit_checkpoint import FitCheckpoint, checkpoint_of
from icons.modules.scoring import Scoring
from icons.store import GradientStore, ScoreStore
from icons.store.unit_writer import UnitWriter, statuses_of
from icons.store.verify import verify

CUTS = int(os.environ.get("ICONS_CUTS", "25"))
NUM_ROWS = 20


def results(row: np.ndarray) -> dict[str, np.ndarray]:
    ones, failed = np.ones(len(row), np.float32), row % 7 == 3
    gradient = np.outer(row + 1.0, np.arange(1.0, 7.0)).astype(np.float32)
    gradient[failed] = 0
    nan = np.where(failed, np.nan, ones).astype(np.float32)
    return {"gradient": gradient, "norm": nan, "loss": nan, "tokens": ones * ~failed, "status": np.where(failed, 4, 1)}


def gradients(path: Path, again: bool = False) -> None:
    """What `icons gradients` does to a store, `--retry-failed` with `again`."""
    store = GradientStore.open_or_create(path, num_rows=NUM_ROWS, dim=6, chunk_rows=4, manifest={"seed": 1})
    retried = statuses_of(store, store.failed_units(), store.statuses()) if again else {}
    writer = UnitWriter(store, again=retried)
    writer.sweep()
    for unit in sorted({*store.missing(), *retried}):
        if writer.claim(unit):
            rows = np.asarray(store.partition.unit_rows(unit))
            writer.collect(rows, results(rows))
    writer.finish()


def filled(path: Path, put: Callable[[UnitWriter, int, np.ndarray], None], extra: Any = None) -> None:
    """A score store with what `put` stores of the rows of each unit."""

    def create() -> None:
        ScoreStore.create(path, num_rows=NUM_ROWS, tasks=["a", "b"], chunk_rows=4, extra=extra)

    store = ScoreStore.taken_up(path, lambda store: None, create)
    writer = UnitWriter(store)
    writer.sweep()
    for unit in store.missing():
        if writer.claim(unit):
            put(writer, unit, np.asarray(store.partition.unit_rows(unit)))
    writer.finish()


def scores(path: Path) -> None:
    """What `icons influence` does to a store."""

    def put(writer: UnitWriter, unit: int, rows: np.ndarray) -> None:
        values = np.stack([rows, rows * 2.0], axis=1).astype(np.float32)
        writer.store_unit(unit, {"influence": values, "stderr": values, "status": np.ones(len(rows), np.uint8)})

    filled(path, put)


def exact_scores(path: Path) -> None:
    """What `icons score` does to a store."""

    def put(writer: UnitWriter, unit: int, rows: np.ndarray) -> None:
        values = results(rows)
        writer.collect(rows, values | dict.fromkeys(("influence", "stderr"), values["gradient"][:, :2]))

    filled(path, put, {"norm": ("float32", []), "loss": ("float32", []), "tokens": ("int32", [])})


def influence(path: Path) -> None:
    """The run of `icons influence`."""
    for name in ("train", "gqa"):
        if not (path.parent / f"{name}.zarr/zarr.json").exists():
            gradients(path.parent / f"{name}.zarr")
    sources = str(path.parent / "train.zarr"), {"gqa": [str(path.parent / "gqa.zarr")]}
    Scoring([sources[0]], sources[1], str(path), chunk_rows=4).run(Fabric(accelerator="cpu", devices=1))


def select(path: Path, fraction: float = 0.5) -> None:
    """`icons select`."""
    if not (path.parent / "scores.zarr/zarr.json").exists():
        scores(path.parent / "scores.zarr")
        (path.parent / "data.json").write_text(json.dumps([{"id": f"r{row}"} for row in range(NUM_ROWS)]))
    made_from = [f"--scores={path.parent}/scores.zarr", f"--data={path.parent}/data.json", f"--fraction={fraction}"]
    assert main(["select", *made_from, f"--out={path}/selected.json", f"--table={path}/table.csv"]) == 0


def files(path: Path) -> dict[str, bytes]:
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: content for name, content in found.items() if ".partial" not in name}


def cuts(recording: Recording, folder: Path, num: int) -> Any:
    """Folders as some of all moments leave them: at even distances, and at random."""
    choose = random.Random(0)
    for number in range(num):
        even = len(recording.events) * number // max(1, num - 1)
        cut = folder / "cut"
        recording.cut(even if number < num // 2 else choose.randint(0, len(recording.events)), cut, choose)
        yield cut
        shutil.rmtree(cut)


@pytest.mark.parametrize("command", [gradients, scores, exact_scores, influence])
def test_a_loss_of_power_at_any_moment_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(icons.store.folder, "_LARGE", 36)  # some files are given to the disk at once, some later
    whole = tmp_path / "whole"
    recording = Recording(whole)
    with recording.running():
        command(whole)
        if command is gradients:
            gradients(whole, again=True)
    expected = files(whole)
    for cut in cuts(recording, tmp_path, CUTS):
        command(cut)
        assert files(cut) == expected
        store = (GradientStore if command is gradients else ScoreStore).open(cut)
        assert store.missing() == [] and list(verify(store)) == []


def test_whenever_the_power_goes_a_selection_is_the_former_or_the_new_one_or_says_that_it_is_neither(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    recording = Recording(whole)
    with recording.running():
        select(whole, 0.5)
        former = files(whole)
        begun = len(recording.events)
        select(whole, 0.3)
    expected, unfinished = files(whole), 0
    for length in range(begun if CUTS < 100 else 0, len(recording.events) + 1):
        for seed in range(1 if CUTS < 100 else 4):
            recording.cut(length, tmp_path / "cut", random.Random(seed))
            try:
                rows = open_selection(tmp_path / "cut/selected.json").rows.tolist()
            except FileNotFoundError:
                assert length < begun
            except ValueError as error:
                assert "a run was about to replace it and did not end" in str(error)
                unfinished += 1
            else:
                lists = np.load(tmp_path / "cut/selected.json.rows.npy").tolist()
                assert rows == lists and files(tmp_path / "cut") in (former, expected)
            select(tmp_path / "cut", 0.3)
            assert files(tmp_path / "cut") == expected
            shutil.rmtree(tmp_path / "cut")
    assert unfinished > 0


class Fitted(LightningModule):
    """A fit of eight steps on one batch, whose dropout makes every step another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(2, 4), batch_size=2)  # type: ignore[arg-type]


def fit(folder: Path, begun: Path | None = None) -> Fitted:
    """What `icons warmup` does, with a checkpoint after every step."""
    quiet: Any = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = Trainer(accelerator="cpu", max_epochs=8, callbacks=[FitCheckpoint(folder, minutes=0.0)], **quiet)
    trainer.fit(module := Fitted(), ckpt_path=begun)
    return module


@pytest.mark.filterwarnings("ignore")
def test_whenever_the_power_goes_a_fit_goes_on_from_a_checkpoint_that_can_be_read(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    recording = Recording(whole)
    with recording.running():
        expected = fit(whole).state_dict()
    named = [event[0] == "names" and "last.ckpt" in event[2] for event in recording.events].index(True)
    first = recording.events.index(("folder", str(whole)), named)
    steps = set()
    for number in range(0, len(recording.events) + 1, max(1, 100 // CUTS)):
        for seed in range(max(1, CUTS // 50)):
            cut = tmp_path / "cut"
            recording.cut(number, cut, random.Random(seed))
            found = checkpoint_of(cut, lambda said: None, check_resumable)
            assert found is not None or number <= first, "once there was one, there is one"
            steps.add(torch.load(found, weights_only=True)["global_step"] if found else 0)
            resumed = fit(cut, found).state_dict()
            assert all(torch.equal(value, expected[name]) for name, value in resumed.items()), number
            shutil.rmtree(cut)
    assert len(steps) > 4


def test_the_recording_would_show_what_is_not_durable(tmp_path: Path) -> None:
    root = tmp_path / "folder"
    recording = Recording(root)
    with recording.running():
        root.mkdir()
        for name in ("kept", "lost"):
            with (root / f".{name}").open("wb") as file:
                file.write(b"content")
                file.flush()
                if name == "kept":
                    os.fsync(file.fileno())
            (root / f".{name}").replace(root / name)
        folder = os.open(root, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    recording.cut(len(recording.events), tmp_path / "cut", random.Random(1))
    assert (tmp_path / "cut/kept").read_bytes() == b"content" and (tmp_path / "cut/lost").read_bytes() != b"content"
