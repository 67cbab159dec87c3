"""Stores from elsewhere: read as zarr reads them whatever their codecs, or refused in one line; never misread."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, TransposeCodec, ZstdCodec

from icons.store import GradientStore
from icons.store.verify import verify

ROWS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
ONES = np.ones(6, np.float32)
KINDS: dict[str, dict[str, Any]] = {
    "as icons writes": {},
    "big endian": {"serializer": BytesCodec(endian="big")},
    "zstd alone": {"compressors": [ZstdCodec()]},
    "no checksum": {"compressors": None},
    "transposed": {"filters": [TransposeCodec(order=(1, 0))]},
    "two checksums": {"compressors": [Crc32cCodec(), Crc32cCodec()]},
    "columns apart": {"chunks": (3, 2)},
    "other rows": {"chunks": (2, 4)},
}


def foreign(path: Path, **options: Any) -> Path:
    """A store of format 1 by zarr alone, which says nothing of how it was laid out."""
    manifest = {"format": 1, "kind": "gradient", "arrays": ["gradients", "norm", "loss", "tokens", "status"]}
    group = zarr.create_group(path, zarr_format=3, attributes={"icons": manifest})
    usual: dict[str, Any] = {"compressors": [Crc32cCodec()], "chunks": (3, 4), "serializer": BytesCodec()}
    columns = {"norm": ONES, "loss": ONES, "tokens": ONES.astype(np.int32), "status": ONES.astype(np.uint8)}
    group.create_array("gradients", data=ROWS, **(usual | options))
    for name, values in columns.items():
        endian = None if values.itemsize == 1 else "little"
        scalar = usual | {"chunks": (3,), "serializer": BytesCodec(endian=endian)}
        group.create_array(name, data=values, **scalar)
    return path


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_rows_are_those_that_zarr_reads_whatever_the_codecs(options: dict[str, Any], tmp_path: Path) -> None:
    store = GradientStore.open(foreign(tmp_path / "s.zarr", **options))
    assert np.array_equal(store.rows(slice(None)), ROWS)
    assert np.array_equal(store.rows(slice(1, 5)), ROWS[1:5])
    assert np.array_equal(store.rows([5, 0, 3]), ROWS[[5, 0, 3]])


@pytest.mark.parametrize("options", [KINDS["big endian"], KINDS["zstd alone"], KINDS["transposed"]])
def test_verify_reads_as_rows_does(options: dict[str, Any], tmp_path: Path) -> None:
    path = foreign(tmp_path / "s.zarr", **options)
    assert list(verify(GradientStore.open(path))) == []


@pytest.mark.parametrize(
    "options",
    [{"chunk_key_encoding": {"name": "default", "separator": "."}},
     {"chunk_key_encoding": {"name": "v2", "separator": "."}}, {"shards": (6, 4)}],
    ids=["dots", "version 2", "shards"],
)  # fmt: skip
def test_other_keys_are_refused_and_not_read_as_zeros(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gradients lies in shards, or under other keys than gradients/c/0"):
        GradientStore.open(foreign(tmp_path / "s.zarr", **options))


def edited(path: Path, file: str, **entries: Any) -> Path:
    document = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(document | entries))
    return path


@pytest.mark.parametrize("rows", [10**10, 10**15])
def test_shapes_of_nothing_ask_for_no_memory(rows: int, tmp_path: Path) -> None:
    path = foreign(tmp_path / "s.zarr")
    for name in ("gradients", "norm", "loss", "tokens", "status"):
        dimensions = [rows, 4] if name == "gradients" else [rows]
        edited(path, f"{name}/zarr.json", shape=dimensions)
    with pytest.raises(ValueError, match=r"has [\d,]+ rows in chunks of .*; expected at most 2,147,483,648 rows"):
        GradientStore.open(path)


MANIFESTS: list[Any] = [
    {"arrays": None}, {"arrays": "status"}, {"arrays": ["gradients"]}, {"arrays": [["status"]]},
    {"projector": "a text"}, {"model": ["a list"]}, {"settings": 7}, {"arrays": ["status", "nowhere"]},
]  # fmt: skip


@pytest.mark.parametrize("entries", MANIFESTS, ids=str)
def test_a_malformed_manifest_is_one_line(entries: dict[str, Any], tmp_path: Path) -> None:
    path = foreign(tmp_path / "s.zarr")
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    edited(path, "zarr.json", attributes={"icons": attributes["icons"] | entries})
    with pytest.raises(ValueError, match=r"store .*: (its manifest|nowhere/zarr.json is missing)") as caught:
        GradientStore.open(path)
    assert len(str(caught.value).splitlines()) == 1
