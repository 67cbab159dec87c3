"""A pipe in a store is refused: nobody waits for it."""

import os
from pathlib import Path

import numpy as np
import pytest

from icons.store import GradientStore


@pytest.mark.parametrize("key", ["zarr.json", "norm/zarr.json", "status/c/0", "gradients/c/0/0", "loss/c/0"])
@pytest.mark.parametrize("codec", [None, "zstd"])
def test_a_pipe_is_no_file_of_a_store(key: str, codec: str | None, tmp_path: Path) -> None:
    store = GradientStore.create(tmp_path / "s.zarr", num_rows=2, dim=2, codec=codec)
    ones = np.ones(2)
    store.write_unit(0, {"gradient": np.ones((2, 2)), "norm": ones, "loss": ones, "tokens": ones, "status": ones})
    (tmp_path / "s.zarr" / key).unlink()
    os.mkfifo(tmp_path / "s.zarr" / key)
    with pytest.raises(ValueError, match=r"is a pipe or a device; expected a file of a store"):
        GradientStore.open(tmp_path / "s.zarr").read_unit(0)
