"""A store of gradients of a trained tower, interrupted anywhere and gone on with, has the bytes of one run."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from sharded_predict import BROKEN, ROWS, collate, model_of, predict, sample
from small_models import llava, one_by_one, trainable
from torch import nn

from icons.batch import Status
from icons.store import GradientStore

pytestmark = pytest.mark.filterwarnings("ignore")


class Stop(Exception):
    pass


class Stops(Callback):
    """Ends the run at a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, _: int = 0) -> None:
        if batch_idx == self.batch:
            raise Stop


def tower_and_projector() -> nn.Module:
    return trainable(llava(), "vision_tower multi_modal_projector q_proj")


def told(rows: list[int]) -> dict[str, Any]:
    """The batch with the number of each row's images, as the datamodule gives it."""
    images = torch.tensor([int("pixel_values" in sample(row)) for row in rows])
    return {**collate(rows), "entries_per_row": {"pixel_values": images}}


@pytest.mark.parametrize("kind", ["adapters", "all weights"])
def test_a_tower_s_rows_are_the_same_however_often_a_run_is_interrupted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part begins with other batches, one without an image or with a broken row: what a model's first pass shows
    decides which path its weights take."""
    make = partial(model_of, "tower") if kind == "adapters" else tower_and_projector
    if kind == "adapters":
        monkeypatch.setattr("sharded_predict.collate", told)
    predict(tmp_path / "whole", kind, model=make())
    for place in (3, 5):
        with pytest.raises(Stop):
            predict(tmp_path / "parts", kind, ends=Stops(place), model=make())
    predict(tmp_path / "parts", kind, model=make())
    whole, parts = (GradientStore.open(tmp_path / name / f"{kind}.zarr") for name in ("whole", "parts"))
    assert whole.status[:].tolist() == [Status.NON_FINITE if row in BROKEN else 1 for row in range(ROWS)]
    for name in ("status", "gradients", "norm", "loss"):
        np.testing.assert_array_equal(parts.stored(name, slice(0, ROWS)), whole.stored(name, slice(0, ROWS)))
    model = make()
    for row in (0, 2, ROWS - 1):
        alone = one_by_one(model, sample(row) | {"row": torch.tensor([row])})[0].numpy()
        assert np.linalg.norm(parts.gradients[row] - alone) < 1e-5 * np.linalg.norm(alone)
