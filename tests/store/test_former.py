"""What lies where a store is to be made, and that taking a store away takes nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest

from icons.store import GradientStore, ScoreStore
from icons.store.former import discard, holds_store
from icons.store.storage import Storage


@pytest.fixture
def store(tmp_path: Path) -> Path:
    made = GradientStore.create(tmp_path / "a.zarr", num_rows=4, dim=2, chunk_rows=2)
    ones = np.ones(2)
    made.write_unit(0, {"gradient": np.ones((2, 2)), "norm": ones, "loss": ones, "tokens": ones, "status": ones})
    return tmp_path / "a.zarr"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_store_is_taken_away_and_nothing_else(store: Path) -> None:
    (store / "notes").mkdir()
    (store / "notes" / "thesis.txt").write_text("mine")
    discard(Storage(store, "r+"))
    assert files(store) == {"notes/thesis.txt"}


def test_a_manifest_cannot_name_what_is_taken_away(store: Path) -> None:
    (store.parent / "photos" / "c").mkdir(parents=True)
    (store.parent / "photos" / "c" / "0").write_text("mine")
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["icons"]["arrays"] = ["../photos", "..", ".", "", 7, None]
    (store / "zarr.json").write_text(json.dumps(document))
    discard(Storage(store, "r+"))
    assert (store.parent / "photos" / "c" / "0").read_text() == "mine"
    assert not (store / "zarr.json").exists()


def test_a_store_of_other_settings_is_replaced_only_where_that_is_asked_for(store: Path) -> None:
    with pytest.raises(ValueError, match=r"dim: the store .* has 2, this run has 3"):
        GradientStore.open_or_create(store, num_rows=4, dim=3)
    assert GradientStore.open_or_create(store, num_rows=4, dim=2, overwrite=True).counts()["done"] == 2
    replaced = GradientStore.open_or_create(store, num_rows=4, dim=3, overwrite=True)
    assert (replaced.dim, replaced.counts()) == (3, {"done": 0, "failed": 0, "missing": 4})
    assert np.array_equal(replaced.gradients[:], np.zeros((4, 3)))


def test_which_store_a_folder_holds(store: Path) -> None:
    assert holds_store(store, GradientStore.KIND)
    assert not holds_store(store, ScoreStore.KIND)
    (store / "zarr.json").write_text("{")
    assert not holds_store(store, GradientStore.KIND)
    (store / "zarr.json").unlink()  # killed while it was created
    assert holds_store(store, GradientStore.KIND)
    (store / "thesis.txt").touch()
    assert not holds_store(store, GradientStore.KIND)
