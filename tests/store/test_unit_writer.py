"""What is passed on is stored, in bounded memory; an error stops the run with its cause; kills cost only time."""

import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import kill_driver
import numpy as np
import pytest

import icons.store.folder
from icons.store import GradientStore
from icons.store.unit_writer import UNCOMMITTED, WRITERS, UnitWriter, statuses_of
from icons.store.verify import verify

DRIVER = Path(__file__).parent / "kill_driver.py"


def results(row: np.ndarray, dim: int = 6) -> dict[str, np.ndarray]:
    gradient = np.outer(row + 1.0, np.arange(1.0, dim + 1)).astype(np.float32)
    ones = np.ones(len(row), np.float32)
    return {"gradient": gradient, "norm": ones, "loss": ones, "tokens": ones, "status": ones}


def test_rows_in_any_order_become_units(store: GradientStore, make: Any) -> None:
    writer = make(store)
    for batch in np.array_split(np.random.default_rng(0).permutation(22), 7):
        writer.collect(batch, results(batch))
    writer.finish()
    np.testing.assert_array_equal(store.rows(slice(None)), results(np.arange(22))["gradient"])
    assert store.missing() == [] and list(verify(store)) == []
    assert not list(Path(store.path).rglob("lease/*"))


def test_an_incomplete_unit_is_not_stored_and_named(store: GradientStore, make: Any) -> None:
    writer = make(store)
    writer.collect(np.arange(7), results(np.arange(7)))
    with pytest.raises(ValueError, match="1 incomplete unit, for example unit 1: row 7 never came"):
        writer.finish()
    assert store.missing() == [1, 2, 3, 4, 5]


def test_two_runs_share_the_units_and_each_leaves_the_others_alone(store: GradientStore, make: Any) -> None:
    first, second = make(store), make(GradientStore.open(store.path, "r+"))
    assert first.claim(0) and not second.claim(0) and second.claim(1)
    rows = np.arange(8)
    first.collect(rows, results(rows) | {"loss": np.full(8, 1.0)})
    second.collect(rows, results(rows) | {"loss": np.full(8, 2.0)})
    first.close()
    second.close()
    assert store.loss[:8].tolist() == [1.0] * 4 + [2.0] * 4


def test_a_unit_that_another_run_is_computing_ends_in_an_error_that_names_it(store: GradientStore, make: Any) -> None:
    other, writer = make(store), make(store)
    assert other.claim(2) and not writer.claim(2, patient=True)
    with pytest.raises(ValueError, match=rf"another run is computing 1 unit, .* by process {os.getpid()}"):
        writer.finish()


def test_a_unit_that_another_run_has_finished_meanwhile_is_no_error(store: GradientStore, make: Any) -> None:
    other, writer = make(store), make(store)
    assert other.claim(2) and not writer.claim(2)
    other.collect(np.arange(8, 12), results(np.arange(8, 12)))
    other.finish()
    assert not writer.claim(2), "it is done, although we planned it"
    writer.finish()
    assert store.missing() == [0, 1, 3, 4, 5]


def test_an_owner_that_was_given_up_does_not_write(store: GradientStore, make: Any) -> None:
    frozen, taker = make(store), make(store)
    assert frozen.claim(0)
    frozen.leases.me = frozen.leases.me.__class__(**{**frozen.leases.me.__dict__, "machine": "elsewhere"})
    store.storage.put("status/lease/0.0", frozen.leases.me.to_bytes())
    taker.leases.timeout_s = 0.01
    assert taker.claim(0, patient=True)
    frozen.collect(np.arange(4), results(np.arange(4)) | {"loss": np.full(4, 9.0)})
    taker.collect(np.arange(4), results(np.arange(4)))
    taker.finish()
    with pytest.raises(ValueError, match="another run is computing") if not store.is_written(0) else _nothing():
        frozen.finish()
    assert store.loss[:4].tolist() == [1.0] * 4


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_failed_units_are_written_again_when_asked(store: GradientStore, make: Any) -> None:
    rows = np.arange(4)
    first = make(store)
    first.collect(rows, results(rows) | {"status": np.array([1, 3, 1, 1])})
    first.finish()
    plain, retry = make(store), make(store, again=statuses_of(store, [0], store.statuses()))
    assert store.failed_units() == [0] and not plain.claim(0) and retry.claim(0)
    retry.collect(rows, results(rows))
    retry.finish()
    assert store.failed_units() == [] and store.counts()["done"] == 4


def no_space(*_: Any) -> None:
    raise OSError(28, "No space left")


def test_an_error_of_the_background_stops_the_run_with_its_cause_and_keeps_what_was_finished(
    store: GradientStore, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = make(store)
    writer.collect(np.arange(4), results(np.arange(4)))
    while store.missing()[0] == 0:
        time.sleep(0.01)
    monkeypatch.setattr(store, "write_rows", no_space)
    with pytest.raises(OSError, match=r"could not be written \(No space left\); finished units are kept: mend the"):
        for start in range(4, 20, 4):
            rows = np.arange(start, start + 4)
            writer.collect(rows, results(rows))
            time.sleep(0.05)
    assert store.missing() == [1, 2, 3, 4, 5]


def collect_until_an_error(writer: UnitWriter) -> None:
    with pytest.raises(OSError, match="No space left"):
        for start in range(0, 20, 4):
            writer.collect(np.arange(start, start + 4), results(np.arange(start, start + 4)))
        writer.finish()
    writer.close()


def test_what_was_written_before_an_error_is_finished(
    store: GradientStore, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, written, two = store.write_rows, [], threading.Event()

    def two_units_find_space(unit: int, columns: Any, guard: Any) -> None:
        if unit >= 2:
            two.wait(20)
            no_space()
        original(unit, columns, guard)
        written.append(unit)
        if len(written) == 2:
            two.set()

    monkeypatch.setattr(store, "write_rows", two_units_find_space)
    collect_until_an_error(make(store))
    assert store.missing() == [2, 3, 4, 5] and not list(Path(store.path).rglob("lease/*"))


def test_a_disk_that_has_lost_something_is_not_asked_again(
    store: GradientStore, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def lost(statuses: Any, guards: Any) -> None:
        asked.append(statuses)
        no_space()

    monkeypatch.setattr(store, "commit", lost)
    collect_until_an_error(make(store))
    assert store.missing() == [0, 1, 2, 3, 4, 5] and len(asked) == 1
    assert not list(Path(store.path).rglob("lease/*"))


def test_each_units_rows_are_durable_before_its_status_is_written_however_many_wait(
    store: GradientStore, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    rename, flush = os.replace, icons.store.folder.flush_path

    def renaming(partial: str, path: str) -> None:
        rename(partial, path)
        events.append(("written", str(Path(path).relative_to(store.path))))

    def flushing(path: str) -> None:
        time.sleep(0.01)  # so that some units wait together
        flush(path)
        events.append(("durable", str(Path(path).relative_to(store.path))))

    monkeypatch.setattr(os, "replace", renaming)
    monkeypatch.setattr(icons.store.folder, "flush_path", flushing)
    writer = make(store, queue_units=6)
    writer.collect(np.arange(22), results(np.arange(22)))
    writer.finish()
    for unit in range(6):
        end = events.index(("written", f"status/c/{unit}"))
        for key in (f"gradients/c/{unit}/0", f"norm/c/{unit}", f"loss/c/{unit}", f"tokens/c/{unit}"):
            begin = events.index(("written", key))
            durable = events.index(("durable", key), begin)
            assert begin < durable < end
            assert ("durable", str(Path(key).parent)) in events[begin:end]


@pytest.mark.parametrize(("what", "beside"), [("write_rows", 0), ("commit", 2 * UNCOMMITTED)])
def test_collecting_waits_for_the_disk_so_that_memory_is_bounded(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch, what: str, beside: int
) -> None:
    store = GradientStore.create(tmp_path / "store", num_rows=400, dim=6, chunk_rows=4)
    writer = make(store, queue_units=2)
    disk = threading.Event()
    monkeypatch.setattr(store, what, lambda *_: disk.wait(20) and [])
    passed: list[int] = []

    def compute() -> None:
        for start in range(0, 400, 4):
            writer.collect(np.arange(start, start + 4), results(np.arange(start, start + 4)))
            passed.append(start)

    thread = threading.Thread(target=compute)
    thread.start()
    time.sleep(0.6)
    assert len(passed) <= 2 + WRITERS + 1 + beside  # waiting, being written, being collected
    disk.set()
    thread.join()
    assert len(passed) == 100


def drive(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DRIVER), str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def assert_same_files(path: Path, undisturbed: Path, *, partial: bool = False) -> None:
    """Names the files that differ: thousands of chunks say nothing. `partial`: what kills left beside is no matter."""
    found, expected = files(path), files(undisturbed)
    names = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
    assert sorted(name for name in names if not (partial and name.endswith(".partial"))) == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kills") / "undisturbed"
    kill_driver.fill(str(path), 0, 1)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "world"), [(25, 1), (4, 3)], ids=["25 kills", "one rank of three, 4 times"])
def test_killed_at_random_moments_and_resumed_the_store_is_the_same_byte_for_byte(
    tmp_path: Path, undisturbed: Path, kills: int, world: int
) -> None:
    ended = drive(tmp_path / "killed", "--kills", str(kills), "--world", str(world))
    assert ended.returncode == 0, ended.stderr
    assert_same_files(tmp_path / "killed", undisturbed, partial=True)
    store = GradientStore.open(tmp_path / "killed")
    assert store.missing() == [] and list(verify(store)) == []


@pytest.mark.slow
def test_two_runs_started_on_the_same_units_at_once_leave_an_intact_store(tmp_path: Path, undisturbed: Path) -> None:
    ended = drive(tmp_path / "both", "--together", "2")
    assert ended.returncode == 0
    assert ended.stdout.count("1") == ended.stderr.count("another run is computing")
    assert_same_files(tmp_path / "both", undisturbed)


@pytest.mark.slow
def test_a_run_that_stands_still_past_its_lease_and_comes_back_changes_nothing(
    tmp_path: Path, undisturbed: Path
) -> None:
    ended = drive(tmp_path / "done", "--freezes", "2", "--seed", "3")
    assert ended.returncode == 0 and ended.stdout.count("ended with 0 0") == 2, ended.stdout + ended.stderr
    for number in range(2):
        assert_same_files(tmp_path / f"done-{number}", undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount the small file system that is filled")
def test_a_full_disk_is_a_clear_error_and_the_store_stays_intact(tmp_path: Path, undisturbed: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], check=True)
    try:
        ended = drive(disk / "full")
        shutil.copytree(disk / "full", tmp_path / "full")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert ended.returncode == 1 and "could not be written (No space left on device)" in ended.stderr
    store = GradientStore.open(tmp_path / "full")
    assert 0 < len(store.missing()) < store.partition.num_units and list(verify(store)) == []
    kill_driver.fill(str(tmp_path / "full"), 0, 1)
    assert_same_files(tmp_path / "full", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["deleted", "moved"])
def test_a_folder_that_vanishes_is_a_clear_error_and_is_not_made_anew(tmp_path: Path, what: str) -> None:
    path = tmp_path / "store"
    process = subprocess.Popen([sys.executable, str(DRIVER), str(path)], stderr=subprocess.PIPE, text=True)
    while not (path / "status/c/20").exists():
        assert process.poll() is None
        time.sleep(0.005)
    path.rename(tmp_path / "moved")
    if what == "deleted":
        shutil.rmtree(tmp_path / "moved")
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "vanished while it was being written" in error
    assert not path.exists()
    if what == "moved":
        assert list(verify(GradientStore.open(tmp_path / "moved"))) == []


def test_the_queue_is_bounded_by_the_setting(store: GradientStore, make: Any) -> None:
    waiting: queue.Queue[Any] = make(store, queue_units=3).waiting
    assert waiting.maxsize == 3
