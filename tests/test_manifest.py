"""Manifests are read as they are typed: what former versions lack has its default, what later ones add stays."""

from pathlib import Path

import pytest

from icons.manifest import DataEntry
from icons.store import GradientStore, ScoreStore
from icons.store.manifest import ScoreManifest, StoreManifest


def test_what_a_former_version_did_not_say_or_said_with_null_has_its_default() -> None:
    facts = ScoreManifest.read({"data": None, "train": None, "groups": None, "dim": 8}, "store")
    assert (facts.data, facts.train, facts.groups, facts.dim) == (DataEntry(), [], {}, 8)
    assert (facts.normalize, facts.reduce, facts.members("gqa")) == ("projected", "max", ["gqa"])


def test_an_entry_of_another_type_is_named() -> None:
    with pytest.raises(ValueError, match=r"store a.zarr: its manifest cannot be read \(.*\$\.data\.num_rows") as caught:
        StoreManifest.read({"data": {"num_rows": "many"}}, "store a.zarr")
    assert len(str(caught.value).splitlines()) == 1


def test_entries_of_a_later_version_stay_in_the_store(tmp_path: Path) -> None:
    said = {"data": {"fingerprint": "d", "shelf": 3}, "moon": {"phase": "full"}}
    store = GradientStore.create(tmp_path / "a.zarr", num_rows=4, dim=2, dtype="float32", manifest=said)
    store.amend(batches="mixed")
    opened = GradientStore.open(tmp_path / "a.zarr")
    assert opened.manifest["moon"] == {"phase": "full"} and opened.manifest["data"]["shelf"] == 3
    assert opened.facts.data.fingerprint == "d" and opened.facts.batches == "mixed"


def test_a_store_that_says_nothing_is_read(tmp_path: Path) -> None:
    store = ScoreStore.create(tmp_path / "s.zarr", num_rows=4, tasks=["gqa"])
    assert store.facts == ScoreManifest()
