"""A writer that was given up and comes back writes nothing; leases that a power cut has emptied stop nobody."""

import dataclasses
import re
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icons.process import process_mark
from icons.store import GradientStore
from icons.store.file import LostUnit
from icons.store.former import discard
from icons.store.lease import Leases, lease_key
from icons.store.storage import Storage
from icons.store.unit_writer import UnitWriter, statuses_of
from icons.store.verify import verify


def results(row: np.ndarray, loss: float = 1.0) -> dict[str, np.ndarray]:
    ones = np.ones(len(row), np.float32)
    gradient = np.outer(row + 1.0, np.arange(1.0, 7.0)).astype(np.float32)
    return {"gradient": gradient, "norm": ones, "loss": ones * loss, "tokens": ones, "status": ones}


def frozen_on(store: GradientStore, make: Any, unit: int, **options: Any) -> UnitWriter:
    """A writer on another machine that holds a unit, and whose counter stands still."""
    writer: UnitWriter = make(store, lease_timeout_s=1000.0, **options)
    writer.leases.me = dataclasses.replace(writer.leases.me, machine="elsewhere")
    assert writer.claim(unit)
    return writer


def finish_instead(store: GradientStore, make: Any, unit: int, **options: Any) -> None:
    taker = make(GradientStore.open(store.path, "r+"), lease_timeout_s=0.01, **options)
    assert taker.claim(unit, patient=True)
    rows = np.asarray(store.partition.unit_rows(unit))
    taker.collect(rows, results(rows))
    taker.finish()


def contents(store: GradientStore) -> dict[str, bytes]:
    root = Path(store.path)
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_a_writer_that_comes_back_after_its_unit_was_finished_changes_nothing(store: GradientStore, make: Any) -> None:
    zombie = frozen_on(store, make, 1)
    finish_instead(store, make, 1)
    before = contents(store)
    zombie.leases.timeout_s = 0.06  # it beats again
    rows = np.arange(4, 8)
    zombie.collect(rows, results(rows, loss=9.0))
    zombie.finish()
    assert contents(store) == before and not [key for key in before if "lease" in key]


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_whose_store_another_has_replaced_writes_no_row_into_the_new_one(
    store: GradientStore, make: Any, begun: bool
) -> None:
    former = make(store)
    rows = np.arange(4, 8)
    if begun:
        assert former.claim(1)
    store.amend(batches="mixed")  # it is the same store all the same
    assert former.claim(0)
    discard(Storage(store.path, "r+"))
    other = {"manifest": {"projector": {"seed": 7}}, "num_rows": 22, "dim": 6, "dtype": "float32", "chunk_rows": 4}
    new = GradientStore.create(store.path, **other)
    if begun:  # and the new store's run has not come as far
        former.leases.release(1, done=False)
        former.leases.take(1, 0)
        former.collect(rows, results(rows, loss=9.0))
    replaced = r"store .*: another run has replaced it, with other settings, meanwhile; give the place that you mean, "
    with pytest.raises(ValueError, match=replaced):
        former.finish() if begun else former.claim(1)
    former.leases.close()
    finish_instead(new, make, 1)
    assert (new.loss[4:8] == 1).all() and new.missing() == [0, 2, 3, 4, 5] and list(verify(new)) == []


def test_a_lease_that_has_gone_is_not_made_again(store: GradientStore) -> None:
    leases = Leases(store.storage, timeout_s=0.06)
    assert leases.acquire(3)
    store.storage.delete(lease_key(3, 0))
    threading.Event().wait(0.2)
    assert store.storage.list("status/lease") == [] and not leases.owns(3)
    leases.close()


@pytest.mark.parametrize("written", range(3))
def test_a_writer_that_was_stopped_before_it_writes_its_unit_or_names_its_files_or_its_status_goes_no_further(
    store: GradientStore, make: Any, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    zombie, calls, check = frozen_on(store, make, 0), [], UnitWriter.check_ours

    def stopped(self: UnitWriter, unit: int) -> None:
        if self is zombie:
            calls.append(unit)
            if len(calls) == written + 1:
                finish_instead(store, make, 0)
        check(self, unit)

    monkeypatch.setattr(UnitWriter, "check_ours", stopped)
    zombie.collect(np.arange(4), results(np.arange(4), loss=9.0))
    zombie.finish()
    assert len(calls) == written + 1
    assert store.loss[:4].tolist() == [1.0] * 4 and list(verify(store)) == [] and store.is_written(0)


def test_two_that_try_the_same_failed_rows_again_write_them_once(store: GradientStore, make: Any) -> None:
    rows = np.arange(4)
    store.write_unit(0, results(rows) | {"status": np.array([1, 3, 1, 1])})
    again = statuses_of(store, [0], store.statuses())
    first, second = (make(GradientStore.open(store.path, "r+"), again=again) for _ in range(2))
    assert first.claim(0) and store.missing()[0] == 0, "marked as not written when it is claimed, and never afterwards"
    first.collect(rows, results(rows))
    first.finish()
    assert not second.claim(0), "the failed rows that it was to try again have been tried"
    assert store.is_written(0)


def test_a_guard_keeps_a_file_from_its_name(store: GradientStore) -> None:
    def lost() -> None:
        raise LostUnit

    columns = store.encode(results(np.arange(4)))
    before = contents(store)
    with pytest.raises(LostUnit):
        store.write_rows(0, columns, lost)
    assert store.commit({0: columns["status"]}, {0: lost}) == []
    assert contents(store) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"owner": 3}', b"\xff\x00"])
def test_a_lease_that_cannot_be_read_is_a_dead_one(store: GradientStore, make: Any, content: bytes) -> None:
    for unit in range(store.partition.num_units):
        store.storage.put(lease_key(unit, 0), content)
    writer = make(store)
    writer.sweep()
    for unit in range(store.partition.num_units):
        assert writer.claim(unit)
    writer.collect(np.arange(22), results(np.arange(22)))
    writer.finish()
    assert store.missing() == [] and store.storage.list("status/lease") == []


def test_a_status_that_another_run_has_taken_away_meanwhile_stops_nobody(store: GradientStore, make: Any) -> None:
    rows = np.arange(4)
    first = make(store)
    first.collect(rows, results(rows))
    while not store.is_written(0):
        time.sleep(0.01)
    GradientStore.open(store.path, "r+").unwrite([0])  # `--repair`, or rows that are tried again
    first.finish()
    assert store.missing()[0] == 0


def test_rows_that_another_run_has_tried_again_since_it_was_planned_are_left_alone(
    store: GradientStore, make: Any
) -> None:
    rows = np.arange(4)
    store.write_unit(0, results(rows) | {"status": np.array([1, 3, 1, 1])})
    planned = statuses_of(store, [0], store.statuses())
    first = make(store, again=planned)
    assert first.claim(0)
    first.collect(rows, results(rows))
    first.finish()
    before = contents(store)
    assert not make(store, again=planned).claim(0) and contents(store) == before


def test_what_killed_runs_left_half_written_goes_and_what_living_ones_write_stays(
    store: GradientStore, make: Any
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, living = re.sub(r"-\d+-", f"-{ended.pid}-", process_mark()), process_mark()
    elsewhere = "0" + living[1:] if living[0] != "0" else "1" + living[1:]
    places = ["", "gradients/", "gradients/c/1/", "norm/c/", "status/c/", "status/digest/", "status/lease/"]
    rows = np.arange(4)
    store.write_unit(1, results(rows))
    store.unwrite([1])
    for place in places:
        for mark in (dead, living, elsewhere):
            path = Path(store.path, f"{place}.1.{mark}.{'a' * 32}.partial")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"half")
    make(store).sweep()
    left = [path.name.split(".")[2] for path in Path(store.path).rglob("*.partial")]
    assert sorted(left) == sorted([living, elsewhere] * len(places))
