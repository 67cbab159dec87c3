"""Products with single validation rows: from arrays, from gradient stores, from a store that holds them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from lightning.fabric import Fabric

from icons.consensus import Pairs, select
from icons.modules.scoring import Scoring
from icons.store import GradientStore, ScoreStore

RNG = np.random.default_rng(11)
TRAIN = RNG.normal(size=(50, 16)).astype(np.float32)
TASKS = {name: RNG.normal(size=(size, 16)).astype(np.float32) for name, size in (("a", 4), ("b", 7), ("c", 2))}


def stored(path: Path, rows: np.ndarray, failed: Sequence[int] = (), **manifest: object) -> str:
    store = GradientStore.create(path, num_rows=len(rows), dim=16, dtype="float32", chunk_rows=8, manifest=manifest)
    status = np.ones(len(rows), np.uint8)
    status[list(failed)] = 3
    for unit in range(store.partition.num_units):
        part = slice(store.partition.unit_rows(unit).start, store.partition.unit_rows(unit).stop)
        one = np.ones(len(rows[part]))
        values = np.where(status[part, None] == 1, rows[part], 0)
        norm = np.linalg.norm(values, axis=1)
        store.write_unit(
            unit, {"gradient": values, "norm": norm, "loss": one, "tokens": one.astype(int), "status": status[part]}
        )
    return str(path)


def scored(
    folder: Path, *, pairwise: bool = False, failed: Sequence[int] = (), rows: np.ndarray = TRAIN, **settings: object
) -> ScoreStore:
    train = stored(folder / "train.zarr", rows, failed)
    tasks = {name: [stored(folder / f"{name}.zarr", rows, (1,) if name == "b" else ())] for name, rows in TASKS.items()}
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return Scoring([train], tasks, str(folder / "scores.zarr"), pairwise=pairwise, **settings).run(fabric)  # type: ignore[arg-type]


def expected() -> np.ndarray:
    unit = TRAIN / np.linalg.norm(TRAIN, axis=1, keepdims=True)
    parts = []
    for name, rows in TASKS.items():
        usable = np.delete(rows, 1, axis=0) if name == "b" else rows
        parts.append(unit @ (usable / np.linalg.norm(usable, axis=1, keepdims=True)).T)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("pairwise", [False, True])
def test_a_score_stores_products_are_the_cosines_without_failed_rows(tmp_path: Path, pairwise: bool) -> None:
    store = scored(tmp_path, pairwise=pairwise, failed=(0, 9))
    with Pairs.of_store(store) as pairs:
        found = np.concatenate([block.numpy() for _, block in pairs.blocks()])
        assert pairs.width == 12 and np.flatnonzero(~pairs.done).tolist() == [0, 9]
        wanted = expected()
        wanted[[0, 9]] = 0
        assert np.allclose(found, wanted, atol=5e-4)  # half precision
        assert (pairs.rows([3, 1]) == found[[3, 1]]).all()
        assert np.allclose(pairs.total(np.array([2, 3, 5])), found[[2, 3, 5]].sum(axis=0))
        assert pairs.task.tolist() == [0] * 4 + [1] * 6 + [2] * 2
        assert np.allclose(pairs.share, [1 / 4] * 4 + [1 / 6] * 6 + [1 / 2] * 2)
        influence = np.asarray(store.influence[:])[1]
        assert np.allclose(
            [(found[1] * pairs.share)[pairs.task == task].sum() for task in range(3)], influence, atol=1e-3
        )
    assert not pairs.path.exists()


def test_rules_read_a_stores_products_by_themselves(tmp_path: Path) -> None:
    store = scored(tmp_path, failed=(0, 9))
    arrays = dict(zip("abc", np.split(expected(), [4, 10], axis=1), strict=True))
    for method in ("balanced", "coverage"):
        chosen = select(store, 0.3, method)
        assert not {0, 9} & set(chosen.rows.tolist()) and len(chosen.rows) == 15
        assert chosen.rows.tolist() == select(store, 0.3, method, pairs=arrays).rows.tolist()


def test_a_groups_members_weigh_equally_and_checkpoints_are_added(tmp_path: Path) -> None:
    store = scored(tmp_path, groups={"ab": ["a", "b"]})
    with Pairs.of_store(store) as pairs:
        assert pairs.tasks == ["ab", "c"]
        assert np.allclose(pairs.share, [1 / 8] * 4 + [1 / 12] * 6 + [1 / 2] * 2)
    other = {name: [*paths, *paths] for name, paths in {n: [f"{tmp_path}/{n}.zarr"] for n in TASKS}.items()}
    fabric = Fabric(accelerator="cpu", devices=1)
    train = [f"{tmp_path}/train.zarr"] * 2
    twice = Scoring(train, other, str(tmp_path / "twice.zarr"), weights=[1.0, 2.0]).run(fabric)
    with Pairs.of_store(twice) as pairs:
        assert np.allclose(pairs.rows([7]), 3 * expected()[7], atol=2e-3)


def test_inner_products_that_half_precision_cannot_hold_are_kept_whole(tmp_path: Path) -> None:
    store = scored(tmp_path, rows=TRAIN * np.float32(1e6), normalize="none")
    with Pairs.of_store(store) as pairs:
        assert np.isfinite(pairs.rows(range(50))).all() and pairs.rows(range(50)).max() > 1e6


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    exact = ScoreStore.create(tmp_path / "exact.zarr", num_rows=4, tasks=["a"], manifest={"tasks": {"a": {}}})
    exact.write_unit(0, np.ones((4, 1), np.float32), np.zeros((4, 1), np.float32), np.ones(4, np.uint8))
    with pytest.raises(
        ValueError,
        match=r"balanced: .*names no gradients of .*--train STORE and --task NAME=STORE for a",
    ):
        select(exact, method="balanced")
    with pytest.raises(ValueError, match="coverage: got scores without gradients; expected a score store"):
        select(np.ones((4, 1), np.float32), method="coverage")
    with pytest.raises(ValueError, match=r"products: got rows \{'b': 4\}; expected an array"):
        select(np.ones((4, 1), np.float32), method="coverage", pairs={"b": np.ones((4, 2))})
    with pytest.raises(ValueError, match="products: got 5 rows and the tasks 0; expected 4"):
        select(np.ones((4, 1), np.float32), method="coverage", pairs={"0": np.ones((5, 2))})
    with pytest.raises(ValueError, match="row 2: has a score, but no product"):
        products = np.ones((4, 2))
        products[2] = np.nan
        select(np.ones((4, 1), np.float32), method="coverage", pairs={"0": products})


def test_a_task_without_a_usable_validation_row_and_a_pool_without_products_are_refused() -> None:
    scores, fine = np.ones((4, 2), np.float32), np.ones((4, 2))
    for empty in (np.full((4, 3), np.nan), np.empty((4, 0))):
        with pytest.raises(ValueError, match="task 1: none of its validation rows is usable"):
            select(scores, method="balanced", pairs={"0": fine, "1": empty})
    with pytest.raises(ValueError, match="no training row has any"):
        select(scores, method="balanced", pairs={"0": fine * np.nan, "1": fine * np.nan})


def test_gradients_of_another_model_are_refused(tmp_path: Path) -> None:
    scored(tmp_path)
    other = stored(tmp_path / "other.zarr", TRAIN, model={"fingerprint": "another"})
    store = ScoreStore.open(tmp_path / "scores.zarr")
    with pytest.raises(ValueError, match=r"model.fingerprint: the store .*other.zarr has 'another'"):
        Pairs.of_store(store, [other])
