"""A gradient store holds what was written, in a form that any Zarr reader opens, and refuses what does not belong."""

import json
import pickle
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import xarray
import zarr

from icons import select
from icons.batch import Status
from icons.manifest import versions
from icons.partition import Partition
from icons.store import GradientStore, ScoreStore, check_compatible, fitting_chunk_rows, open_store
from icons.store.layout import parse_codec
from icons.store.verify import verify

MANIFEST = {
    "data": {"fingerprint": "d1", "num_rows": 10, "path": "train.json"},
    "model": {"fingerprint": "m1"},
    "adapter": {"fingerprint": "a1"},
    "projector": {"kind": "count_sketch", "dim": 6, "seed": 0},
    "preconditioner": {"form": "adam", "fingerprint": "p1"},
}


def results(rows: range, dim: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows.start)
    n = len(rows)
    status = np.ones(n, np.uint8)
    gradient = rng.standard_normal((n, dim)).astype(np.float32)
    found = {
        "gradient": gradient,
        "norm": np.linalg.norm(gradient, axis=1).astype(np.float32),
        "loss": rng.random(n).astype(np.float32) + 1,
        "tokens": np.arange(1, n + 1, dtype=np.int32),
        "status": status,
    }
    status[0], gradient[0] = Status.IMAGE_MISSING, 0
    found["norm"][0] = found["loss"][0] = np.nan
    found["tokens"][0] = 0
    return found


def filled(
    path: Path, dtype: str = "float16", num_rows: int = 10, chunk_rows: int = 4, **options: Any
) -> GradientStore:
    store = GradientStore.create(
        path, num_rows=num_rows, dim=6, dtype=dtype, chunk_rows=chunk_rows, manifest=MANIFEST, **options
    )
    for unit in range(store.partition.num_units):
        store.write_unit(unit, results(store.partition.unit_rows(unit)))
    return store


def expected(num_rows: int = 10, chunk_rows: int = 4) -> dict[str, np.ndarray]:
    partition = Partition(num_rows, chunk_rows)
    parts = [results(partition.unit_rows(unit)) for unit in range(partition.num_units)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 0), ("int8", 0.02)])
def test_rows_come_back_as_they_were_written(tmp_path: Path, dtype: str, tolerance: float) -> None:
    filled(tmp_path / "s", dtype)
    store = GradientStore.open(tmp_path / "s")
    whole = expected()
    np.testing.assert_allclose(store.rows(slice(None)), whole["gradient"], atol=tolerance)
    np.testing.assert_array_equal(store.rows([7, 2, 2]), store.rows(slice(None))[[7, 2, 2]])
    for name in ("norm", "loss", "tokens", "status"):
        np.testing.assert_array_equal(getattr(store, name)[:], whole[name])
    unit = store.read_unit(2)
    np.testing.assert_array_equal(unit.gradient, store.rows(slice(8, 10)))
    np.testing.assert_array_equal(unit.tokens, whole["tokens"][8:])
    assert unit.gradient.dtype == np.float32 and store.dtype == dtype and store.dim == 6
    assert (store.scale is None) == (dtype == "float32")


def test_missing_failed_and_counts_follow_the_status(tmp_path: Path) -> None:
    store = GradientStore.create(tmp_path / "s", num_rows=10, dim=6, chunk_rows=4)
    assert store.missing() == [0, 1, 2] and store.counts() == {"done": 0, "failed": 0, "missing": 10}
    store.write_unit(1, results(range(4, 8)))
    assert store.missing() == [0, 2] and store.counts() == {"done": 3, "failed": 1, "missing": 6}
    assert {reason: rows.tolist() for reason, rows in store.failed().items()} == {Status.IMAGE_MISSING: [4]}
    assert store.failed_units() == [1] and store.is_written(1) and not store.is_written(2)
    store.unwrite([1])
    assert store.missing() == [0, 1, 2] and not store.rows([4]).any() and store.rows([5]).any()


def test_chunks_written_without_zarr_are_byte_for_byte_zarrs(tmp_path: Path) -> None:
    store = filled(tmp_path / "ours", "int8", num_rows=10)
    group = zarr.open_group(filled(tmp_path / "zarrs", "int8", num_rows=10).path, mode="r+")
    for name in store.arrays:
        array = group[name]
        array[:] = np.zeros_like(array[:])  # zarr now deletes or rewrites every chunk
        array.with_config({"write_empty_chunks": True})[:] = store.arrays[name][:]
    files = sorted(path.relative_to(store.path) for path in Path(store.path).rglob("*") if path.is_file())
    assert len(files) == 7 + 7 * 3
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "zarrs" / file).read_bytes(), file


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_plain_zarr_tensorstore_and_xarray_read_the_same_numbers_and_dimension_names(
    tmp_path: Path, dtype: str
) -> None:
    store = filled(tmp_path / "s", dtype)
    group = zarr.open_group(tmp_path / "s", mode="r")
    dataset = xarray.open_zarr(tmp_path / "s", consolidated=False, mask_and_scale=False)
    for name, array in store.arrays.items():
        numbers = array[:]
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/s/{name}/"}}
        foreign = tensorstore.open(spec, read=True).result()
        np.testing.assert_array_equal(group[name][:], numbers)
        np.testing.assert_array_equal(foreign.read().result(), numbers)
        np.testing.assert_array_equal(dataset[name].values, numbers)
        names = ("row", "dim") if name == "gradients" else ("row",)
        assert foreign.domain.labels == names == dataset[name].dims == group[name].metadata.dimension_names
    assert group.attrs["icons"]["projector"] == MANIFEST["projector"]
    assert group.attrs["icons_status"]["1"] == "done" and group.attrs["icons_status"]["3"] == "image_missing"


def test_an_opened_store_reads_a_few_small_files_and_a_unit_one_chunk_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "s", num_rows=80)
    read: list[str] = []

    def counting(original: Callable[..., Any], path: Path | str, *rest: Any) -> Any:
        read.append(str(Path(path).relative_to(tmp_path / "s")))
        return original(path, *rest)

    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: counting(read_bytes, path))
    monkeypatch.setattr(np, "fromfile", partial(counting, np.fromfile))
    store = GradientStore.open(tmp_path / "s")
    assert len(read) < 20 and all(name.endswith("zarr.json") for name in read if (tmp_path / "s" / name).exists())
    read.clear()
    store.read_unit(3)
    assert sorted(read) == ["gradients/c/3/0", "loss/c/3", "norm/c/3", "scale/c/3", "status/c/3", "tokens/c/3"]


def test_a_float16_store_without_scales_is_read_and_gone_on_with(tmp_path: Path) -> None:
    """As earlier versions made them."""
    GradientStore.create(tmp_path / "s", num_rows=10, dim=6, chunk_rows=4, manifest=MANIFEST)
    shutil.rmtree(tmp_path / "s" / "scale")
    group = json.loads((tmp_path / "s" / "zarr.json").read_text())
    group["attributes"]["icons"]["arrays"].remove("scale")
    group["attributes"]["icons_layout"].pop("scale")
    group.get("consolidated_metadata", {"metadata": {}})["metadata"].pop("scale", None)
    (tmp_path / "s" / "zarr.json").write_text(json.dumps(group))
    store = GradientStore.open_or_create(tmp_path / "s", num_rows=10, dim=6, manifest=MANIFEST)
    for unit in range(3):
        store.write_unit(unit, results(store.partition.unit_rows(unit)))
    assert store.scale is None and not list(verify(store))
    np.testing.assert_array_equal(store.rows(range(10)), expected()["gradient"].astype(np.float16))


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
@pytest.mark.parametrize("codec", ["zstd", "gzip", "numcodecs.lz4", '{"name": "zstd", "configuration": {"level": 3}}'])
def test_a_codec_compresses_and_comes_back(tmp_path: Path, codec: str) -> None:
    store = filled(tmp_path / "s", codec=codec)
    plain = filled(tmp_path / "plain")
    np.testing.assert_array_equal(store.rows(slice(None)), plain.rows(slice(None)))
    listed = json.loads((tmp_path / "s/gradients/zarr.json").read_text())["codecs"]
    assert [entry["name"] for entry in listed] == ["bytes", str(parse_codec(codec)["name"]), "crc32c"]  # type: ignore[index]


def test_unknown_codec_and_dtype_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="codec 'zip7': unknown to zarr; expected a name such as zstd"):
        GradientStore.create(tmp_path / "s", num_rows=10, dim=6, codec="zip7")
    with pytest.raises(ValueError, match="dtype 'int4': expected one of float16, float32, int8"):
        GradientStore.create(tmp_path / "s", num_rows=10, dim=6, dtype="int4")
    with pytest.raises(ValueError, match="got num_rows=0, dim=6; expected both to be >= 1"):
        GradientStore.create(tmp_path / "s", num_rows=0, dim=6)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("dim", [512, 5120, 8192, 1_000_000])
def test_chunks_of_a_large_store_have_two_to_sixteen_megabytes(dim: int, dtype: str) -> None:
    size = fitting_chunk_rows(7_000_000, dim, dtype) * dim * np.dtype(dtype).itemsize
    assert 2e6 <= size <= 16e6 or fitting_chunk_rows(7_000_000, dim, dtype) == 1
    assert fitting_chunk_rows(7_000_000, 20_000_000, dtype) == 1
    assert fitting_chunk_rows(3, dim, dtype) <= 3


def test_a_unit_of_another_shape_or_with_other_arrays_is_an_error(tmp_path: Path) -> None:
    store = GradientStore.create(tmp_path / "s", num_rows=10, dim=6, chunk_rows=4)
    with pytest.raises(ValueError, match=r"unit 2: gradients has shape \(4, 6\); expected \(2, 6\)"):
        store.write_unit(2, results(range(8, 12)))
    with pytest.raises(ValueError, match=r"unit 0: got \['status'\]; expected \['gradients', 'loss', "):
        store.write_columns(0, {"status": np.ones(4, np.uint8)})
    assert store.missing() == [0, 1, 2]


def test_a_store_is_not_created_twice(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    with pytest.raises(FileExistsError, match="exists already; expected a new place, or open it to go on"):
        GradientStore.create(tmp_path / "s", num_rows=10, dim=6)


def test_creation_that_was_cut_short_is_finished_or_refused(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    (tmp_path / "s/zarr.json").unlink()  # the file that is written last
    with pytest.raises(FileNotFoundError, match=r"has no zarr.json; expected a store made by icons"):
        GradientStore.open(tmp_path / "s")
    with pytest.raises(ValueError, match=r"gradients/zarr.json is from another run with other settings"):
        GradientStore.open_or_create(tmp_path / "s", num_rows=10, dim=7, chunk_rows=4)
    store = GradientStore.open_or_create(tmp_path / "s", num_rows=10, dim=6, chunk_rows=4, manifest=MANIFEST)
    assert store.missing() == []


@pytest.mark.parametrize("what", ["notes.txt", "images/a.png", ".zgroup", "data/c/0"])
def test_a_folder_of_somebody_else_is_refused_and_not_touched(tmp_path: Path, what: str) -> None:
    (tmp_path / what).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / what).write_text("mine")
    for make in (GradientStore.open_or_create, GradientStore.create):
        with pytest.raises(ValueError, match=rf"holds {what}, which no such store has; expected a new or empty place"):
            make(tmp_path, num_rows=10, dim=6)
    with pytest.raises(ValueError, match=f"holds {what}"):
        ScoreStore.create(tmp_path, num_rows=10, tasks=["a"])
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / what]
    assert (tmp_path / what).read_text() == "mine"


def test_a_zarr_group_of_somebody_else_is_refused_and_not_touched(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "s", attributes={"mine": 1}).create_array("gradients", shape=(3,), dtype="int8")
    before = {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="is no icons store; expected a gradient store made by icons"):
        GradientStore.open_or_create(tmp_path / "s", num_rows=3, dim=1)
    assert {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()} == before


def test_runs_that_create_a_store_at_once_get_the_same_one_or_the_error(tmp_path: Path) -> None:
    manifests = [MANIFEST, MANIFEST, MANIFEST | {"model": {"fingerprint": "m2"}}] * 4
    ready, opened, errors = threading.Barrier(len(manifests)), [], []

    def start(manifest: dict[str, Any]) -> None:
        ready.wait()
        try:
            opened.append(resume(tmp_path / "s", manifest, chunk_rows=4))
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=start, args=(manifest,)) for manifest in manifests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) + len(errors) == 12 and len(opened) in (4, 8)
    assert len({store.manifest["model"]["fingerprint"] for store in opened}) == 1
    assert all("model.fingerprint: the store" in error for error in errors)


def resume(path: Path, manifest: dict[str, Any] | None = None, **options: Any) -> GradientStore:
    given = {"num_rows": 10, "dim": 6, "manifest": MANIFEST if manifest is None else manifest} | options
    return GradientStore.open_or_create(path, **given)


def test_resume_with_the_same_settings_goes_on_wherever_the_data_lies_now(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    moved = MANIFEST | {"data": MANIFEST["data"] | {"path": "/elsewhere/train.json"}, "versions": {"torch": "3"}}
    assert resume(tmp_path / "s", moved).missing() == []
    assert resume(tmp_path / "s").partition.chunk_rows == 4


def test_an_amended_manifest_is_found_again_and_the_rest_stays(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    GradientStore.open(tmp_path / "s", mode="r+").amend(batches="mixed")
    store = GradientStore.open(tmp_path / "s")
    assert store.manifest["batches"] == "mixed" and store.manifest["data"] == MANIFEST["data"]
    assert store.missing() == [] and list(verify(store)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"fingerprint": "d2", "num_rows": 10}}, "data.fingerprint: the store .* has 'd1', this run has 'd2'"),
        ({"model": {"fingerprint": "m2"}}, r"model.fingerprint: .* has 'm1', this run has 'm2' \(.*\)"),
        ({"adapter": {"fingerprint": "a2"}}, "adapter.fingerprint: .* 'a1', this run has 'a2'"),
        ({"projector": {"kind": "count_sketch", "dim": 6, "seed": 1}}, "projector.seed: .* has 0, this run has 1"),
        ({"preconditioner": {"form": "none"}}, "preconditioner.form: .* 'adam', this run has 'none'"),
    ],
)
def test_resume_with_another_manifest_is_one_error_with_both_values(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    filled(tmp_path / "s")
    with pytest.raises(ValueError, match=message + "; expected both to be the same: mend one, or use another store"):
        resume(tmp_path / "s", MANIFEST | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype: .* has 'float16', this run has 'int8'"),
        ({"num_rows": 11}, "rows: .* has 10, this run has 11"),
        ({"dim": 7}, "dim: .* has 6, this run has 7"),
        ({"chunk_rows": 5}, "chunk_rows: .* has 4, this run has 5"),
    ],
)
def test_resume_with_another_shape_is_one_error_with_both_values(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    filled(tmp_path / "s")
    with pytest.raises(ValueError, match=message):
        resume(tmp_path / "s", **options)


def test_check_compatible_compares_single_entries_and_names_both_sides() -> None:
    a, b = {"projector": {"kind": "x", "dim": 5}}, {"projector": {"kind": "x", "dim": 6}}
    check_compatible(a, b, ["projector.kind", "absent"])
    with pytest.raises(ValueError, match=r"projector.dim: train.zarr has 5, gqa.zarr has 6"):
        check_compatible(a, b, ["projector"], "train.zarr", "gqa.zarr")


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"store .*absent: no such folder"):
        GradientStore.open(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"store .*file: is a file; expected a folder"):
        GradientStore.open(tmp_path / "file")
    zarr.create_group(tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign: is no icons store; expected a gradient store made by icons"):
        GradientStore.open(tmp_path / "foreign")
    ScoreStore.create(tmp_path / "scores", num_rows=3, tasks=["a"])
    with pytest.raises(ValueError, match="scores: is a score store; expected a gradient store made by icons"):
        GradientStore.open(tmp_path / "scores")
    filled(tmp_path / "newer")
    text = (tmp_path / "newer/zarr.json").read_text()
    (tmp_path / "newer/zarr.json").write_text(text.replace('"format": 2', '"format": 9'))
    with pytest.raises(ValueError, match="newer: has format 9; expected 2: read it with a newer version"):
        GradientStore.open(tmp_path / "newer")


def test_damaged_metadata_and_chunks_are_named(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    for array, read in [("status", store.missing), ("gradients", lambda: store.rows(slice(0, 10)))]:
        path = next(path for path in (tmp_path / "s" / array / "c").rglob("*") if path.is_file())
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(
            ValueError, match=f"{array} cannot be read, a chunk is damaged or missing .*run `icons verify"
        ):
            read()
    (tmp_path / "s/norm/zarr.json").write_text("{")
    with pytest.raises(ValueError, match=r"norm/zarr.json is missing or damaged"):
        GradientStore.open(tmp_path / "s")
    (tmp_path / "s/zarr.json").write_text("{")
    with pytest.raises(ValueError, match=r"zarr.json is damaged .*; expected JSON: restore it"):
        GradientStore.open(tmp_path / "s")


@pytest.mark.parametrize("codec", [None, "zstd"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_missing_chunk_of_a_finished_unit_is_an_error_wherever_it_is_read(
    tmp_path: Path, dtype: str, codec: str | None
) -> None:
    store = filled(tmp_path / "s", dtype, codec=codec)
    (tmp_path / "s/gradients/c/1/0").unlink()
    reads: list[Callable[[], Any]] = [
        lambda: store.rows(slice(0, 10)),
        lambda: store.rows(slice(0, 10, 3)),
        lambda: store.rows([9, 5]),
        lambda: store.tensor(slice(5, 6)),
        lambda: store.read_unit(1),
        lambda: store.stored("gradients", slice(4, 8)),
        lambda: store.gradients[:],
        lambda: store.gradients[6],
    ]
    for read in reads:
        with pytest.raises(ValueError, match="gradients/c/1/0: is missing, and its unit is finished"):
            read()
    assert store.rows(slice(0, 4)).any(), "what is there can be read"
    store.unwrite([1])
    for read in reads:
        read()


def test_a_missing_chunk_of_scores_is_an_error_wherever_it_is_read(tmp_path: Path) -> None:
    store = ScoreStore.create(tmp_path / "s", num_rows=4, tasks=["a"], chunk_rows=2)
    for unit in range(2):
        store.write_unit(unit, np.ones((2, 1)), np.ones((2, 1)), np.ones(2, np.uint8))
    (tmp_path / "s/influence/c/1/0").unlink()
    for read in (lambda: store.influence[:], lambda: store.stored("influence", slice(0, 4)), lambda: select(store)):
        with pytest.raises(ValueError, match="influence/c/1/0: is missing, and its unit is finished"):
            read()


def test_a_status_of_another_version_is_named(tmp_path: Path) -> None:
    store = filled(tmp_path / "s")
    store.status[5] = 77
    with pytest.raises(ValueError, match=r"rows have the status 77, which this version does not know; expected one of"):
        store.failed()


def test_repr_shows_shape_progress_size_projector_and_model(tmp_path: Path) -> None:
    shown = repr(filled(tmp_path / "s"))
    assert "10 x 6 float16 (0.00 GB)" in shown and "done       7   failed 3   missing 0" in shown
    assert "count_sketch (dim 6, seed 0)" in shown and "m1   adapter a1" in shown


def test_open_store_opens_either_kind(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    ScoreStore.create(tmp_path / "scores", num_rows=3, tasks=["a"])
    assert isinstance(open_store(tmp_path / "s"), GradientStore)
    assert isinstance(open_store(tmp_path / "scores"), ScoreStore)


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_stored_rows_are_those_that_zarr_reads_wherever_they_begin_and_end(tmp_path: Path, codec: str | None) -> None:
    store = filled(tmp_path / "s", "int8", codec=codec)
    store.unwrite([1])
    (tmp_path / "s/norm/c/1").unlink()
    for name, array in store.arrays.items():
        for start in range(11):
            for stop in range(start, 12):
                found = store.stored(name, slice(start, stop))
                assert found.dtype == array.dtype
                np.testing.assert_array_equal(found, array[start:stop], strict=True)


def test_a_few_rows_do_not_keep_a_chunk_in_memory(tmp_path: Path) -> None:
    store = filled(tmp_path / "s", "float32")
    few, unit = store.rows(slice(4, 5)), store.rows(slice(4, 8))
    assert few.base is None and unit.base is not None
    np.testing.assert_array_equal(few, unit[:1])


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_a_tensor_holds_the_same_numbers(tmp_path: Path, dtype: str) -> None:
    store = filled(tmp_path / "s", dtype)
    for rows in (slice(None), slice(2, 3), [7, 1]):
        found = store.tensor(rows)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), store.rows(rows))


def test_rows_by_a_slice_with_a_step_are_those_by_their_numbers(tmp_path: Path) -> None:
    store = filled(tmp_path / "s", "int8")
    np.testing.assert_array_equal(store.rows(slice(8, 1, -3)), store.rows([8, 5, 2]))


def test_versions_of_what_is_installed_and_none_of_what_is_not() -> None:
    assert versions("numpy", "no-such-package") == {"numpy": np.__version__, "no-such-package": None}


def test_a_store_travels_as_its_place(tmp_path: Path) -> None:
    store = GradientStore.create(tmp_path / "s", num_rows=4, dim=2)
    again = pickle.loads(pickle.dumps(store))
    assert (again.path, again.mode, again.manifest) == (store.path, store.mode, store.manifest)
