"""Why rows failed is kept beside the store, by unit, before the unit's status; and summed up by kind."""

from pathlib import Path

import numpy as np
import pytest

from icons.batch import Status
from icons.store import GradientStore, ScoreStore
from icons.store.failures import (
    LONGEST,
    MOST_ROWS,
    Failure,
    FailureLog,
    check_some_done,
    failures_in,
    failures_of,
    kinds,
    told,
)

MISSING = Status.IMAGE_MISSING


def failure(row: int, reason: str = "image a/1.jpg is not in images", status: Status = MISSING) -> Failure:
    return Failure(row, f"id-{row}", status, reason)


def make(path: Path, failed: dict[int, Status], num_rows: int = 10, chunk_rows: int = 4) -> GradientStore:
    store = GradientStore.create(path, num_rows=num_rows, dim=2, chunk_rows=chunk_rows)
    for unit in range(store.partition.num_units):
        write(store, unit, failed)
    return store


def write(store: GradientStore, unit: int, failed: dict[int, Status]) -> None:
    rows = store.partition.unit_rows(unit)
    ones = np.ones(len(rows), np.float32)
    status = np.array([failed.get(row, Status.DONE) for row in rows], np.uint8)
    values = {"gradient": np.ones((len(rows), 2), np.float32), "norm": ones, "loss": ones}
    store.write_unit(unit, {**values, "tokens": ones.astype(np.int32), "status": status})


def test_sentences_come_back_by_row_whatever_order_the_rows_came_in(tmp_path: Path) -> None:
    store = make(tmp_path / "s", {1: MISSING, 2: Status.BAD_RECORD, 9: MISSING, 5: Status.NON_FINITE})
    log = FailureLog(store)
    log.add(np.array([3, 9, 8]), [failure(9)])
    log.add(np.array([2, 1]), [failure(2, "no conversations", Status.BAD_RECORD), failure(1)])
    assert not store.storage.exists("status/failures/0.jsonl")  # row 0 has not come
    log.add(np.array([0, 4, 5, 6, 7]), [])
    own = Failure(
        5, "", Status.NON_FINITE, "the loss or the gradient is not finite, or too large for the store's dtype"
    )
    expected = [failure(1), failure(2, "no conversations", Status.BAD_RECORD), own, failure(9)]
    assert list(failures_of(GradientStore.open(tmp_path / "s"))) == expected
    assert list(failures_of(store, [9, 0, 2])) == [expected[1], expected[3]]


def test_a_unit_that_is_retried_forgets_its_former_failures(tmp_path: Path) -> None:
    store = make(tmp_path / "s", {1: MISSING})
    FailureLog(store).add(np.arange(4), [failure(1)])
    FailureLog(store, again=[0]).add(np.arange(4), [])
    assert not store.storage.exists("status/failures/0.jsonl")
    assert [one.reason for one in failures_of(store)] == ["its image is missing"]


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    many = MOST_ROWS + 5
    store = make(tmp_path / "s", dict.fromkeys(range(many), MISSING), many, many)
    FailureLog(store).add(np.arange(many), [failure(row, "x" * 10_000) for row in range(many)])
    found = list(failures_of(store))
    assert len(found) == many and len(found[0].reason) == LONGEST + 2
    assert found[-1].reason == "its image is missing"


def test_a_damaged_file_costs_its_sentences_alone(tmp_path: Path) -> None:
    store = make(tmp_path / "s", {1: MISSING, 2: MISSING})
    FailureLog(store).add(np.arange(4), [failure(1), failure(2)])
    lines = (store.storage.get("status/failures/0.jsonl") or b"").splitlines()
    store.storage.put("status/failures/0.jsonl", b"\xff{\n[]\n" + lines[1])
    assert [one.reason for one in failures_of(store)] == ["its image is missing", failure(2).reason]


def test_scores_have_the_sentences_of_the_store_they_were_made_from(tmp_path: Path) -> None:
    train = make(tmp_path / "train", {1: MISSING})
    FailureLog(train).add(np.arange(4), [failure(1)])
    manifest = {"train": [{"path": str(tmp_path / "train")}]}
    scores = ScoreStore.create(tmp_path / "scores", num_rows=10, tasks=["a"], manifest=manifest, chunk_rows=10)
    zeros = np.zeros((10, 1), np.float32)
    scores.write_unit(0, zeros, zeros, train.statuses())
    assert list(failures_of(scores)) == [failure(1)]
    (tmp_path / "train").rename(tmp_path / "moved")
    assert [one.reason for one in failures_of(scores)] == ["its image is missing"]


def test_sentences_are_of_one_kind_if_names_and_numbers_alone_differ() -> None:
    several = [failure(row, f"image {row}/a.jpg is not in images") for row in range(5)]
    several += [failure(7, "the record has 2 <image> marks for 1 images", Status.BAD_RECORD)]
    assert [(kind.status, kind.count) for kind in kinds(several)] == [(MISSING, 5), (Status.BAD_RECORD, 1)]
    lines = list(told(several))
    assert lines[:2] == ["failed 5 rows: image_missing", "  row 0 (id id-0): image 0/a.jpg is not in images"]
    assert len(lines) == 4 + 2


def test_a_store_of_failed_rows_alone_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    store = make(tmp_path / "s", dict.fromkeys(range(8), MISSING))
    FailureLog(store).add(np.arange(4), [failure(0)])
    check_some_done(store)
    with pytest.raises(ValueError, match=r"each of its rows failed \(4\); the first, row 0 \(id id-0\): image a/1"):
        check_some_done(store, np.arange(4))


def test_a_batch_brings_its_failures_with_their_sentences_or_none() -> None:
    batch = {"failed_row": np.array([3]), "failed_status": np.array([int(MISSING)])}
    assert failures_in(batch) == failures_in({}) == []
    sentences = {"failed_reason": ["image a/1.jpg is not in images"], "failed_id": ["id-3"]}
    assert failures_in(batch | sentences) == [failure(3)]
