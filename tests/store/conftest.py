"""A small gradient store, and writers on it that are closed when the test ends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from icons.store import GradientStore
from icons.store.unit_writer import UnitWriter


@pytest.fixture
def store(tmp_path: Path) -> GradientStore:
    return GradientStore.create(tmp_path / "store", num_rows=22, dim=6, dtype="float32", chunk_rows=4)


@pytest.fixture
def make() -> Iterator[Any]:
    made: list[UnitWriter] = []

    def build(store: GradientStore, **options: Any) -> UnitWriter:
        made.append(UnitWriter(store, **options))
        return made[-1]

    yield build
    for writer in made:
        writer.close()
