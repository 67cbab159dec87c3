"""Weights are read from both kinds of file, whole or in part; what is not weights is refused."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from icons.models.tensor_files import find_tensors, read_tensors, write_tensors

TENSORS = {"a": torch.arange(3.0), "b.c": torch.ones(2, 2)}


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "old.bin"])
def test_reads_whole_files_and_parts(tmp_path: Path, name: str) -> None:
    if name == "x.safetensors":
        save_file(TENSORS, tmp_path / name)
    else:
        torch.save(TENSORS | {"number": 3}, tmp_path / name, _use_new_zipfile_serialization=name != "old.bin")
    whole = read_tensors(tmp_path / name)
    assert set(whole) == set(TENSORS)
    assert all(torch.equal(whole[key], value) for key, value in TENSORS.items())
    assert list(read_tensors(tmp_path / name, lambda key: "c" in key)) == ["b.c"]


def test_finds_tensors_over_shards_safetensors_first(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(1)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    assert set(find_tensors(tmp_path, lambda name: True)) == {"a", "b"}
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert set(find_tensors(tmp_path, lambda name: True)) == set(TENSORS)


def test_refuses_what_is_not_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file; expected weights"):
        read_tensors(tmp_path / "x.bin")
    for name in ("x.safetensors", "x.bin"):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1")
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as weights"):
            read_tensors(tmp_path / name)
    torch.save({"code": Path("x")}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_tensors(tmp_path / "x.bin")


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16).T}
    metadata = {f"key {number}": f'"{number}"\n\x01\x7f/ä\\' for number in range(20)}
    for number in range(4):
        write_tensors(tmp_path / f"{number}", tensors, dict(reversed(metadata.items())) if number % 2 else metadata)
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(4)}) == 1
    with safe_open(tmp_path / "0", "pt") as found:
        assert found.metadata() == metadata
        assert all(torch.equal(found.get_tensor(name), value) for name, value in tensors.items())
