"""One run holds a unit at a time; the dead are taken over, whatever their clocks said; the living are not."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from icons.process import machine, start_time
from icons.store.lease import Holder, Leases, lease_key
from icons.store.storage import Storage


class MemoryKeys:
    """Keys in a dict: the operations of an object store, with its atomic create."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def put(self, key: str, value: bytes) -> None:
        self.values[key] = value

    def put_new(self, key: str, value: bytes) -> bool:
        with self.lock:
            return self.values.setdefault(key, value) is value

    def exists(self, key: str) -> bool:
        return key in self.values

    def delete(self, key: str) -> None:
        self.values.pop(key, None)

    def list(self, prefix: str) -> list[str]:
        return [key for key in self.values if key.startswith(prefix)]


@pytest.fixture(params=["folder", "memory"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return Storage(tmp_path / "store", "w") if request.param == "folder" else MemoryKeys()


@pytest.fixture
def make(keys: Any) -> Iterator[Any]:
    made: list[Leases] = []

    def build(elsewhere: bool = False, timeout_s: float = 30.0) -> Leases:
        leases = Leases(keys, timeout_s)
        if elsewhere:
            leases.me = dataclasses.replace(leases.me, machine="other/boot/pid")
        made.append(leases)
        return leases

    yield build
    for leases in made:
        leases.close()


def test_only_one_run_holds_a_unit(make: Any) -> None:
    first, second = make(), make()
    assert first.acquire(3) and first.acquire(3) and not second.acquire(3) and second.acquire(4)
    assert first.owns(3) and not second.owns(3)
    assert str(second.holder(3)).startswith(f"process {os.getpid()} on ")


def test_a_finished_unit_leaves_no_file_and_a_unit_given_back_may_be_taken_at_once(make: Any, keys: Any) -> None:
    first, second = make(), make()
    assert first.acquire(1) and first.acquire(2)
    first.release(1, done=True)
    first.release(1, done=True)
    first.close()
    assert keys.list("status/lease") == []
    assert second.acquire(2) and second.holder(2).owner == second.me.owner
    second.release(2, done=True)
    assert keys.list("status/lease") == []


def test_many_threads_after_one_dead_unit_leave_one_holder(make: Any, keys: Any) -> None:
    keys.put(lease_key(5, 0), dead_here().to_bytes())
    runs = [make() for _ in range(8)]
    won: list[bool] = []
    threads = [threading.Thread(target=lambda run=run: won.append(run.acquire(5))) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won) == 1 and sum(run.owns(5) for run in runs) == 1


def dead_here() -> Holder:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return Holder("ended", machine(), ended.pid, "1")


def test_a_process_id_that_is_used_again_is_not_the_owner(make: Any, keys: Any) -> None:
    keys.put(lease_key(0, 0), Holder("before", machine(), os.getpid(), "another start").to_bytes())
    assert make().acquire(0)


def test_a_zombie_has_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert start_time(process.pid) != ""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(process.pid) == ""
    process.communicate()


def test_an_owner_elsewhere_is_dead_when_its_counter_stands_still_for_our_timeout(make: Any) -> None:
    dead, taker = make(elsewhere=True, timeout_s=1000.0), make(timeout_s=0.3)
    assert dead.acquire(7)
    assert not taker.acquire(7), "seen for the first time: who knows"
    time.sleep(0.4)
    assert taker.acquire(7) and not dead.owns(7) and taker.owns(7)


def test_an_owner_that_was_given_up_gives_nothing_back_so_that_those_before_it_stay_given_up(make: Any) -> None:
    first, second, third = (make(timeout_s=1000.0) for _ in range(3))
    for number, leases in enumerate((first, second, third)):
        leases.me = dataclasses.replace(leases.me, machine=f"machine {number}")
    assert first.acquire(7)
    for taker in (second, third):
        assert not taker.acquire(7), "seen for the first time"
        taker.seen = {owner: (beat, since - 2000.0) for owner, (beat, since) in taker.seen.items()}
        assert taker.acquire(7)
    second.close()  # it comes back
    assert third.owns(7) and not first.owns(7) and not second.owns(7)
    third.release(7, done=False)
    assert second.held == {} and not first.owns(7)


def test_leases_of_a_done_unit_are_swept_together_or_not_at_all(make: Any, keys: Any) -> None:
    alive, sweeper = make(elsewhere=True), make()
    keys.put(lease_key(3, 0), alive.me.to_bytes())
    for unit, generation in ((3, 1), (4, 0), (4, 1), (5, 0)):
        keys.put(lease_key(unit, generation), dead_here().to_bytes())
    sweeper.sweep(lambda unit: unit != 5)
    assert sorted(keys.list("status/lease")) == [lease_key(3, 0), lease_key(3, 1), lease_key(5, 0)]


def test_an_owner_elsewhere_that_moves_is_left_alone_however_long_it_takes(make: Any) -> None:
    alive, watcher = make(elsewhere=True, timeout_s=0.3), make(timeout_s=0.5)
    assert alive.acquire(7)
    until = time.monotonic() + 1.2
    while time.monotonic() < until:
        assert not watcher.acquire(7)
        time.sleep(0.05)
    assert alive.owns(7)


def test_patience_takes_over_from_the_dead_and_leaves_the_living(make: Any) -> None:
    dead, alive, watcher = make(True, 1000.0), make(True, 0.3), make(False, 0.6)
    assert dead.acquire(1) and alive.acquire(2)
    start = time.monotonic()
    assert watcher.acquire_patiently(1) and 0.5 < time.monotonic() - start < 3
    assert not watcher.acquire_patiently(2)


def test_patience_does_not_wait_for_a_living_process_here(make: Any) -> None:
    first, second = make(timeout_s=1000.0), make(timeout_s=1000.0)
    first.acquire(1)
    start = time.monotonic()
    assert not second.acquire_patiently(1) and time.monotonic() - start < 1


def test_clocks_are_not_compared(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, watcher = make(elsewhere=True, timeout_s=0.3), make(timeout_s=5.0)
    assert alive.acquire(7)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine believes it is 2096
    assert not watcher.acquire(7) and not watcher.acquire_patiently(7)
