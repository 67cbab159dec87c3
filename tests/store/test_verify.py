"""Verify finds and names what a disk can do to a store, and repair marks just the units that need it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icons.cli import main
from icons.partition import Partition
from icons.store import GradientStore
from icons.store.score_store import ScoreStore
from icons.store.verify import repair, verify


def results(rows: range) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows.start)
    gradient, ones = rng.standard_normal((len(rows), 8)).astype(np.float32), np.ones(len(rows), np.float32)
    found = {"gradient": gradient, "norm": ones * 2, "loss": ones, "tokens": ones * 7, "status": ones.copy()}
    for name in ("gradient", "tokens"):
        found[name][0] = 0
    found["norm"][0] = found["loss"][0] = np.nan
    found["status"][0] = 5
    return found


@pytest.fixture(params=["float16", "int8"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> GradientStore:
    made = GradientStore.create(
        tmp_path / "store",
        num_rows=30,
        dim=8,
        chunk_rows=6,
        dtype=request.param,
        manifest={"projector": {"dim": 8}, "data": {"num_rows": 30}},
    )
    for unit in range(4):  # the last is not written
        made.write_unit(unit, results(Partition(30, 6).unit_rows(unit)))
    return made


def found(store: GradientStore | ScoreStore) -> list[str]:
    return [str(finding) for finding in verify(store)]


def test_a_sound_store_has_no_findings_and_missing_units_are_none(store: GradientStore) -> None:
    assert found(store) == [] and store.missing() == [4]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped bit":
        content[len(content) // 2] ^= 0x10
    path.write_bytes(content if how == "flipped bit" else content[:-3] if how == "truncated" else b"")
    if how == "deleted":
        path.unlink()


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "emptied", "deleted"])
@pytest.mark.parametrize("chunk", ["gradients/c/2/0", "norm/c/2", "loss/c/2", "tokens/c/2", "status/c/2"])
def test_damage_is_found_named_and_repaired_by_that_unit_alone(store: GradientStore, how: str, chunk: str) -> None:
    path = Path(store.path) / chunk
    before = path.read_bytes()
    damage(path, how)
    if (how, chunk) == ("deleted", "status/c/2"):
        assert found(store) == [] and store.missing() == [2, 4], "without its status a unit is not written"
    else:
        what = "is missing" if how == "deleted" else "is damaged"
        findings = list(verify(store))
        assert len(findings) == 1 and f"{chunk.partition('/')[0]}, unit 2: the chunk {chunk} {what}" in str(findings[0])
        assert repair(store, findings) == [2]
    assert store.missing() == [2, 4] and found(store) == []
    store.write_unit(2, results(range(12, 18)))
    assert found(store) == [] and path.read_bytes() == before


@pytest.mark.parametrize(
    ("array", "row", "value", "message"),
    [
        ("gradients", 8, 0, "gradients, unit 1: status says done, and all numbers are 0: row 8"),
        ("gradients", 6, 1, "gradients, unit 1: status says failed, and the row is not 0: row 6"),
        ("norm", 8, np.nan, "norm, unit 1: status says done, and the number is not finite: row 8"),
        ("norm", 8, 0, "norm, unit 1: status says done, and the number is not above 0: row 8"),
        ("loss", 8, np.inf, "loss, unit 1: status says done, and the number is not finite: row 8"),
        ("loss", 6, 1.0, "loss, unit 1: status says failed, and there is a number: row 6"),
        ("tokens", 8, 0, "tokens, unit 1: status says done, and there is no token: row 8"),
        ("status", 8, 0, "status, unit 1: not written, in a unit that is: row 8"),
        ("status", 8, 99, "status, unit 1: a code that has no meaning: row 8"),
    ],
)
def test_content_that_does_not_agree_with_the_status_is_found(
    store: GradientStore, array: str, row: int, value: float, message: str
) -> None:
    store.arrays[array][row] = value
    assert message in found(store)


def test_numbers_that_are_not_finite_are_found(tmp_path: Path) -> None:
    store = GradientStore.create(tmp_path / "s", num_rows=6, dim=8)
    store.write_unit(0, results(range(6)))
    store.gradients[3, 2] = np.nan
    store.gradients[5] = np.inf
    assert "gradients, unit 0: status says done, and numbers are not finite: rows 3, 5" in found(store)


def test_shapes_that_do_not_agree_with_the_manifest_are_found(tmp_path: Path) -> None:
    manifest = {"projector": {"dim": 9}, "data": {"num_rows": 7}}
    store = GradientStore.create(tmp_path / "s", num_rows=6, dim=8, manifest=manifest)
    assert found(store) == [
        "store: the manifest says projector.dim = 9, the arrays have 8",
        "store: the manifest says data.num_rows = 7, the arrays have 6",
    ]


def test_arrays_of_different_lengths_are_found(store: GradientStore) -> None:
    format_1(store.path)
    store.arrays["norm"].resize((29,))
    opened = GradientStore.open(store.path, "r+")
    assert found(opened) == ["norm: has 29 rows in chunks of 6; status has others"]
    assert repair(opened, verify(opened)) == [] and store.counts()["missing"] == 6, "no row is thrown away for it"


def format_1(path: str) -> None:
    """Makes a store one of the first format: without layout and digests."""
    document = json.loads((Path(path) / "zarr.json").read_text())
    document["attributes"]["icons"]["format"] = 1
    del document["attributes"]["icons_layout"]
    (Path(path) / "zarr.json").write_text(json.dumps(document))
    shutil.rmtree(Path(path) / "status/digest")


def test_a_store_of_the_first_format_is_read_gone_on_with_and_verified(store: GradientStore) -> None:
    before = store.rows(slice(None))
    format_1(store.path)
    old = GradientStore.open(store.path, "r+")
    np.testing.assert_array_equal(old.rows(slice(None)), before)
    old.write_unit(4, results(range(24, 30)))
    assert found(old) == [] and old.missing() == [] and not (Path(store.path) / "status/digest").exists()
    damage(Path(store.path) / "norm/c/1", "flipped bit")
    assert [finding.unit for finding in verify(old)] == [1]


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize(
    ("one", "other"),
    [("gradients/c/0/0", "gradients/c/1/0"), ("norm/c/2", "loss/c/2"), ("gradients/c/3/0", "gradients/c/1/0")],
)
def test_chunks_that_have_been_swapped_are_found_although_each_is_whole(
    store: GradientStore, one: str, other: str
) -> None:
    swap(Path(store.path) / one, Path(store.path) / other)
    findings = list(verify(store))
    for key in (one, other):
        assert any(f"the chunk {key} is not the one that was written with its unit" in str(each) for each in findings)
    units = sorted({int(key.split("/")[2]) for key in (one, other)})
    assert repair(store, findings) == units
    for unit in units:
        store.write_unit(unit, results(Partition(30, 6).unit_rows(unit)))
    assert found(store) == []


def test_a_digest_that_is_missing_is_found(store: GradientStore) -> None:
    (Path(store.path) / "status/digest/3").unlink()
    assert found(store) == ["status, unit 3: the digest status/digest/3 is missing or damaged"]


@pytest.mark.parametrize(
    ("array", "entry", "value", "message"),
    [
        ("norm", "shape", [29], r"has shape \[29\]; expected \[30\], as the store was made"),
        ("status", "fill_value", 1, "has fill_value 1; expected 0, as the store was made"),
        ("gradients", "data_type", "float64", "has data_type 'float64'; expected '"),
        ("loss", None, None, "is missing or damaged; expected the array's metadata"),
    ],
)
def test_metadata_that_have_changed_are_refused_and_restored_and_no_row_is_thrown_away(
    store: GradientStore, array: str, entry: str | None, value: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, path = store.counts(), Path(store.path) / array / "zarr.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {entry: value}) if entry else "{")
    with pytest.raises(ValueError, match=rf"{array}/zarr.json {message}.*verify .*--repair`, which touches no row"):
        GradientStore.open(store.path)
    assert main(["verify", store.path]) == 1
    assert "1 finding; --repair restores the metadata as the store was made, and no row" in capsys.readouterr().out
    assert main(["verify", store.path, "--repair"]) == 0
    assert f"restored: the metadata of {array}; no row was touched" in capsys.readouterr().out
    assert json.loads(path.read_text()) == content
    restored = GradientStore.open(store.path)
    assert restored.counts() == before and found(restored) == []


def test_scores_are_verified_too(tmp_path: Path) -> None:
    store = ScoreStore.create(tmp_path / "s", num_rows=4, tasks=["a", "b"])
    scores = np.ones((4, 2), np.float32)
    store.write_unit(0, scores, scores, np.array([1, 1, 3, 1], np.uint8))
    assert found(store) == []
    store.influence[1, 1] = np.nan
    assert found(store)[1:] == ["influence, unit 0: status says done, and a number is not finite: row 1"]


def test_repair_removes_what_killed_runs_left(store: GradientStore) -> None:
    left = Path(store.path) / "gradients/c/0/.0.abc.partial"
    left.write_bytes(b"half")
    assert found(store) == [] and repair(store, []) == [] and not left.exists()


def test_the_command_names_damage_and_repairs_it(store: GradientStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", store.path]) == 0
    assert "sound: 20 rows done, 4 failed, 6 missing" in capsys.readouterr().out
    damage(Path(store.path) / "gradients/c/1/0", "flipped bit")
    (Path(store.path) / "loss/c/3").unlink()
    assert main(["verify", store.path]) == 1
    printed = capsys.readouterr().out
    assert "gradients, unit 1: the chunk gradients/c/1/0 is damaged" in printed and "loss/c/3 is missing" in printed
    assert "2 findings in 2 units; --repair marks such units as not written" in printed
    assert main(["verify", store.path, "--repair"]) == 0
    assert "repaired: 2 units marked as not written (1,3)" in capsys.readouterr().out
    assert main(["verify", store.path]) == 0 and store.missing() == [1, 3, 4]
