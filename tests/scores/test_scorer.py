from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import icons
from icons.batch import Status
from icons.scores import Scorer, influence
from icons.scores.rows import ArrayRows, as_rows, blocks, ranges
from icons.store import GradientStore

RNG = np.random.default_rng(0)
K = 48
TRAIN = RNG.normal(size=(70, K)).astype(np.float32)
TASKS = {name: RNG.normal(size=(rows, K)).astype(np.float32) for name, rows in (("gqa", 9), ("pope", 300), ("mme", 1))}
MANIFEST = {
    "data": {"fingerprint": "d"},
    "model": {"fingerprint": "m"},
    "adapter": {"fingerprint": "a"},
    "projector": {"kind": "count_sketch", "dim": K, "seed": 0},
}


def store(
    path: Path, rows: np.ndarray, failed: tuple[int, ...] = (), written: int | None = None, **settings
) -> GradientStore:
    """A gradient store of these rows; norms are three times the projected ones, to tell the two apart."""
    manifest = {**MANIFEST, **settings.pop("manifest", {})}
    made = GradientStore.create(
        path, num_rows=len(rows), dim=rows.shape[1], chunk_rows=16, manifest=manifest, **settings
    )
    for unit in range(made.partition.num_units if written is None else written):
        part = list(made.partition.unit_rows(unit))
        status = np.array([Status.IMAGE_MISSING if row in failed else Status.DONE for row in part], np.uint8)
        ok = status == Status.DONE
        made.write_unit(
            unit,
            {
                "gradient": np.where(ok[:, None], rows[part], 0).astype(np.float32),
                "norm": np.where(ok, 3 * np.linalg.norm(rows[part], axis=1), np.nan).astype(np.float32),
                "loss": np.where(ok, 1.0, np.nan).astype(np.float32),
                "tokens": ok.astype(np.int32),
                "status": status,
            },
        )
    return GradientStore.open(path)


def full_matrix_means(train: np.ndarray, tasks: dict[str, np.ndarray]) -> np.ndarray:
    """As the original: normalise, multiply everything with everything, average."""
    columns = []
    for rows in tasks.values():
        left = train.astype(float) / np.linalg.norm(train.astype(float), axis=1, keepdims=True)
        right = rows.astype(float) / np.linalg.norm(rows.astype(float), axis=1, keepdims=True)
        columns.append((left @ right.T).mean(axis=1))
    return np.stack(columns, axis=1)


def test_one_averaged_vector_equals_averaging_the_full_matrix() -> None:
    found = influence(TRAIN, TASKS)
    assert found.dtype == torch.float32 and found.shape == (70, 3)
    assert np.abs(found.numpy() - full_matrix_means(TRAIN, TASKS)).max() < 1e-7


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_a_store_gives_what_its_rows_give(tmp_path: Path, dtype: str) -> None:
    train = store(tmp_path / "train.zarr", TRAIN, dtype=dtype)
    tasks = {name: store(tmp_path / f"{name}.zarr", rows, dtype=dtype) for name, rows in TASKS.items()}
    expected = full_matrix_means(
        train.rows(slice(None)), {name: task.rows(slice(None)) for name, task in tasks.items()}
    )
    assert np.abs(influence(train, tasks).numpy() - expected).max() < 1e-6
    assert np.abs(expected - full_matrix_means(TRAIN, TASKS)).max() < 0.01
    none = influence(train, tasks, normalize="none").numpy()
    product = np.stack(
        [(train.rows(slice(None)) @ task.rows(slice(None)).T).mean(axis=1) for task in tasks.values()], axis=1
    )
    assert np.allclose(none, product, rtol=1e-3, atol=1e-4)


def test_exact_norms_come_from_the_store(tmp_path: Path) -> None:
    train, task = store(tmp_path / "train.zarr", TRAIN), store(tmp_path / "gqa.zarr", TASKS["gqa"])
    plain = influence(train, {"gqa": task}).numpy()
    assert np.allclose(influence(train, {"gqa": task}, normalize="exact").numpy(), plain / 9, rtol=2e-3, atol=1e-6)
    one_side = influence(train, {"gqa": task}, normalize="exact", task_normalize="projected").numpy()
    assert np.allclose(one_side, plain / 3, rtol=2e-3, atol=1e-6)


def test_failed_rows_are_nan_and_failed_validation_rows_are_left_out(tmp_path: Path) -> None:
    train = store(tmp_path / "train.zarr", TRAIN, failed=(3, 40))
    task = store(tmp_path / "gqa.zarr", TASKS["gqa"], failed=(0, 5))
    found = influence(train, {"gqa": task}).numpy()
    assert np.flatnonzero(np.isnan(found[:, 0])).tolist() == [3, 40]
    usable = np.delete(TASKS["gqa"], [0, 5], axis=0)
    ok = ~np.isnan(found[:, 0])
    assert np.abs(found[ok] - full_matrix_means(TRAIN[ok], {"gqa": usable})).max() < 1e-3
    (part, *_) = Scorer.of(train, {"gqa": task}).score(range(16))
    assert torch.isnan(part.stderr[3]).all() and (part.stderr[4] > 0).all()


def test_a_gradient_of_zeros_has_no_influence() -> None:
    rows = np.concatenate([TRAIN[:3], np.zeros((1, K), np.float32)])
    assert influence(rows, TASKS)[3].tolist() == [0, 0, 0]
    with_zero = {"gqa": np.concatenate([TASKS["gqa"], np.zeros((9, K), np.float32)])}
    assert torch.allclose(influence(TRAIN, with_zero), influence(TRAIN, {"gqa": TASKS["gqa"]}) / 2)


def test_scaling_any_row_changes_nothing() -> None:
    scales = RNG.lognormal(size=(70, 1)).astype(np.float32)
    scaled = {name: rows * np.float32(7) for name, rows in TASKS.items()}
    assert torch.allclose(influence(TRAIN * scales, scaled), influence(TRAIN, TASKS), atol=1e-6)


def test_blocks_do_not_change_a_bit(tmp_path: Path) -> None:
    train = store(tmp_path / "train.zarr", TRAIN)
    scorer = Scorer.of(train, TASKS)
    whole = torch.cat([part.influence for part in scorer.score(range(70))])
    pieces = [part.influence for rows in (range(32), range(32, 48), range(48, 70)) for part in scorer.score(rows)]
    assert torch.equal(torch.cat(pieces), whole)


def test_checkpoints_are_added_with_their_weights() -> None:
    later = RNG.normal(size=TRAIN.shape).astype(np.float32)
    tasks_later = {name: RNG.normal(size=rows.shape).astype(np.float32) for name, rows in TASKS.items()}
    both = {name: [rows, tasks_later[name]] for name, rows in TASKS.items()}
    expected = 0.3 * full_matrix_means(TRAIN, TASKS) + 2 * full_matrix_means(later, tasks_later)
    assert np.abs(influence([TRAIN, later], both, weights=[0.3, 2.0]).numpy() - expected).max() < 1e-6
    mean = (full_matrix_means(TRAIN, TASKS) + full_matrix_means(later, tasks_later)) / 2
    assert np.abs(influence([TRAIN, later], both).numpy() - mean).max() < 1e-6


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_groups_are_reduced_to_one_column(reduce: str) -> None:
    tasks = {"count": TASKS["gqa"], "pope": TASKS["pope"], "scene": TASKS["mme"]}
    single = full_matrix_means(TRAIN, tasks)
    scorer = Scorer.of(TRAIN, tasks, groups={"mme": ["count", "scene"]}, reduce=reduce)
    found = torch.cat([part.influence for part in scorer.score(range(70))]).numpy()
    assert scorer.tasks == ["mme", "pope"]
    assert np.abs(found[:, 0] - getattr(single[:, [0, 2]], reduce)(axis=1)).max() < 1e-6
    assert np.abs(found[:, 1] - single[:, 1]).max() < 1e-6


def test_pairs_are_the_full_matrix(tmp_path: Path) -> None:
    task = store(tmp_path / "gqa.zarr", TASKS["gqa"], failed=(5,))
    scorer = Scorer.of(TRAIN, {"gqa": task}, pairwise=True)
    pairs = torch.cat([part.pairs["gqa"] for part in scorer.score(range(70))]).numpy()
    assert pairs.shape == (70, 9) and np.isnan(pairs[:, 5]).all()
    whole = torch.cat([part.influence for part in scorer.score(range(70))])
    assert np.abs(np.nanmean(pairs, axis=1) - whole[:, 0].numpy()).max() < 1e-6


def test_the_public_name_is_the_function() -> None:
    assert icons.influence is influence


def refuse(message: str, *arguments, **options) -> None:
    with pytest.raises(ValueError, match=message):
        influence(*arguments, **options)


def test_sources_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    train = store(tmp_path / "train.zarr", TRAIN)
    rows = TASKS["gqa"]
    other = {"projector": {"kind": "count_sketch", "dim": K, "seed": 1}}
    refuse(
        "projector.seed: the training rows has 0, task gqa has 1",
        train, {"gqa": store(tmp_path / "seed.zarr", rows, manifest=other)},
    )  # fmt: skip
    model = {"model": {"fingerprint": "x"}}
    refuse("model.fingerprint: .*'m'.*'x'", train, {"gqa": store(tmp_path / "model.zarr", rows, manifest=model)})
    refuse("dim: the training rows have 48 numbers each, task gqa has 8", TRAIN, {"gqa": rows[:, :8]})
    refuse("rows: the first checkpoint has 70, checkpoint 2 has 60", [TRAIN, TRAIN[:60]], {"gqa": [rows, rows]})
    data = store(tmp_path / "data.zarr", TRAIN, manifest={"data": {"fingerprint": "e"}})
    refuse("data.fingerprint: the first checkpoint has 'd', checkpoint 2 has 'e'", [train, data], {"gqa": [rows, rows]})


def test_records_read_in_another_way_are_refused(tmp_path: Path) -> None:
    """Another processor's settings, or another template; what a former version's store does not tell is let be."""
    rows = TASKS["gqa"]
    read = {"reader": {"processor": "336"}, "preprocessing": {"template": "v1"}}
    train = store(tmp_path / "train.zarr", TRAIN, manifest=read)
    other = store(tmp_path / "processor.zarr", rows, manifest=read | {"reader": {"processor": "448"}})
    refuse("reader.processor: the training rows has .*336.*, task gqa has .*448", train, {"gqa": other})
    template = store(tmp_path / "template.zarr", rows, manifest=read | {"preprocessing": {"template": "chat"}})
    refuse("preprocessing.template: the training rows has 'v1', task gqa has 'chat'", train, {"gqa": template})
    assert len(influence(train, {"gqa": store(tmp_path / "former.zarr", rows)})) == len(TRAIN)


def test_preconditioned_validation_rows_are_taken_only_when_asked_for(tmp_path: Path) -> None:
    adam = {"preconditioner": {"form": "adam"}}
    train = store(tmp_path / "train.zarr", TRAIN, manifest=adam)
    tasks = {"gqa": store(tmp_path / "gqa.zarr", TASKS["gqa"], manifest=adam)}
    refuse("task gqa: its rows went through the preconditioner 'adam', .* --preconditioned-tasks", train, tasks)
    plain = {"gqa": store(tmp_path / "plain.zarr", TASKS["gqa"], manifest={"preconditioner": {"form": "none"}})}
    assert influence(train, tasks, preconditioned_tasks=True).equal(influence(train, plain))


def test_rows_divided_by_the_root_of_a_curvature_need_tasks_divided_by_the_same(tmp_path: Path) -> None:
    def kfac(name: str, rows: Any, **changes: Any) -> GradientStore:
        own = {"form": "kfac_root", "damping": 0.01, "fingerprint": "f"} | changes
        return store(tmp_path / f"{name}.zarr", rows, manifest={"preconditioner": own})

    train, task = kfac("train", TRAIN), kfac("task", TASKS["gqa"])
    assert torch.isfinite(influence(train, {"gqa": task})).any()
    for name, other in (("form", "none"), ("damping", 0.1), ("fingerprint", "g")):
        refuse(f"preconditioner.{name}: .*; they must agree", train, {"gqa": kfac(name, TASKS["gqa"], **{name: other})})
    plain = store(tmp_path / "plain.zarr", TRAIN, manifest={"preconditioner": {"form": "adam"}})
    refuse("task gqa: its rows went through the preconditioner 'kfac_root'", plain, {"gqa": task})


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    refuse("got no task", TRAIN, {})
    refuse("task gqa: has no validation rows", TRAIN, {"gqa": np.empty((0, K), np.float32)})
    nothing = store(tmp_path / "none.zarr", TASKS["mme"], failed=(0,))
    refuse("task mme: none of its 1 validation rows is usable", TRAIN, {"mme": nothing})
    partly = store(tmp_path / "part.zarr", TRAIN, written=2)
    refuse("the training rows: 38 of 70 rows of .*part.zarr are not written", partly, TASKS)
    refuse("task gqa: 38 of 70 rows", TRAIN, {"gqa": partly})
    refuse("task gqa: got 1 gradient store for 2 checkpoints", [TRAIN, TRAIN], {"gqa": TASKS["gqa"]})
    refuse("weights: got 1 for 2 checkpoints", [TRAIN, TRAIN], {"gqa": [TASKS["gqa"]] * 2}, weights=[1.0])
    refuse("group mme: no task 'count'", TRAIN, TASKS, groups={"mme": ["count"]})


def test_settings_are_checked_without_the_type_checker() -> None:
    from icons.scores.task_means import task_vectors

    unchecked = getattr(task_vectors, "__wrapped__", task_vectors)
    rows = as_rows(TRAIN)
    with pytest.raises((ValueError, TypeError), match=r"expected one of projected|normalize"):
        unchecked(rows, {}, "length", torch.device("cpu"))


def test_arrays_read_as_stores_do() -> None:
    rows = as_rows(torch.from_numpy(TRAIN).bfloat16())
    assert isinstance(rows, ArrayRows) and rows.gradients.dtype == np.float32
    assert "70, 48" in repr(rows)
    with pytest.raises((ValueError, TypeError)):
        ArrayRows(np.ones(3, np.float32))


def test_pieces_end_at_chunks_and_cover_the_rows(tmp_path: Path) -> None:
    train = store(tmp_path / "train.zarr", TRAIN)
    assert ranges(range(5, 40), train) == [range(5, 16), range(16, 32), range(32, 40)]
    seen = [block.rows for block in blocks(train, ranges(range(70), train), torch.device("cpu"))]
    assert [row for rows in seen for row in rows] == list(range(70))
