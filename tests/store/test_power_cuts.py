"""Whenever the power goes, the same line then ends with the store that an undisturbed run makes, byte for byte.

`ICONS_CUTS=200` tries that many moments.
"""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from power_cuts import Recording

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


def scores(path: Path) -> None:
    """What `icons influence` does to a store."""

    def create() -> None:
        ScoreStore.create(path, num_rows=NUM_ROWS, tasks=["a", "b"], chunk_rows=4)

    store = ScoreStore.taken_up(path, lambda store: None, create)
    writer = UnitWriter(store)
    writer.sweep()
    for unit in store.missing():
        if writer.claim(unit):
            rows = np.asarray(store.partition.unit_rows(unit))
            values = np.stack([rows, rows * 2.0], axis=1).astype(np.float32)
            writer.store_unit(unit, {"influence": values, "stderr": values, "status": np.ones(len(rows), np.uint8)})
    writer.finish()


def files(path: Path) -> dict[str, bytes]:
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: content for name, content in found.items() if not name.endswith(".partial")}


@pytest.mark.parametrize("command", [gradients, scores])
def test_a_loss_of_power_at_any_moment_is_gone_on_from(tmp_path: Path, command: object) -> None:
    assert callable(command)
    whole = tmp_path / "whole"
    recording = Recording(whole)
    with recording.running():
        command(whole)
        if command is gradients:
            gradients(whole, again=True)
    expected, choose = files(whole), random.Random(0)
    for number in range(CUTS):
        length = len(recording.events) * number // max(1, CUTS - 1) if number < CUTS // 2 else -1
        cut = tmp_path / "cut"
        recording.cut(length if length >= 0 else choose.randint(0, len(recording.events)), cut, choose)
        command(cut)
        assert files(cut) == expected, f"cut {number}"
        store = (GradientStore if command is gradients else ScoreStore).open(cut)
        assert store.missing() == [] and list(verify(store)) == []
        shutil.rmtree(cut)


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
