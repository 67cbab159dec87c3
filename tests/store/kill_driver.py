"""Writes a store through UnitWriter in child processes, and kills them. Run as `python kill_driver.py STORE ...`.

A child is forked from a process that has imported everything and started nothing, so that a kill costs milliseconds.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from icons.partition import UnitPlan, assign
from icons.store import GradientStore
from icons.store.unit_writer import UnitWriter

NUM_ROWS, CHUNK_ROWS, DIM, BATCH_ROWS = 3000, 5, 64, 2


def compute(row: np.ndarray) -> dict[str, np.ndarray]:
    """The results of some rows: the same numbers whenever and wherever they are computed; every 11th row fails."""
    rows = [np.random.default_rng(int(number)).standard_normal(DIM) for number in row]
    gradient, failed = np.array(rows, np.float32), row % 11 == 5
    gradient[failed] = 0
    norm = np.where(failed, np.nan, np.linalg.norm(gradient, axis=1)).astype(np.float32)
    return {
        "gradient": gradient,
        "norm": norm,
        "loss": norm / 3,
        "tokens": np.where(failed, 0, row % 50 + 1).astype(np.int32),
        "status": np.where(failed, 4, 1).astype(np.uint8),
    }


def begun(path: str) -> GradientStore:
    return GradientStore.open_or_create(path, num_rows=NUM_ROWS, dim=DIM, chunk_rows=CHUNK_ROWS, manifest={"seed": 1})


def fill(
    path: str, rank: int, world: int, todo: list[int] | None = None, machine: str = "", timeout_s: float = 90.0
) -> None:
    """What one rank does: claims its units, computes them in batches, stores them.

    Args:
        path: the store.
        rank, world: of how many this one is.
        todo: units of all ranks, the same list for each: ranks that looked for what is missing at different moments
            would share it out differently, some units to two ranks and some to none. Default: all that are missing.
        machine: what its leases say that it runs on; default: this one.
        timeout_s: of leases.
    """
    store = begun(path)
    todo = store.missing() if todo is None else todo
    writer = UnitWriter(store, lease_timeout_s=timeout_s)
    writer.leases.me = replace(writer.leases.me, machine=machine or writer.leases.me.machine)
    try:
        writer.sweep()
        for unit in UnitPlan(store.partition, assign(todo, world, rank), writer.claim).claimed():
            rows = np.array(store.partition.unit_rows(unit))
            for start in range(0, len(rows), BATCH_ROWS):
                batch = rows[::-1][start : start + BATCH_ROWS]
                writer.collect(batch, compute(batch))
    finally:
        writer.close()
    writer.finish()


def planned(path: str) -> list[int]:
    """The units that are missing, looked for in a child: what forks must have started nothing."""
    reads, writes = os.pipe()

    def plan() -> None:
        with os.fdopen(writes, "w") as pipe:
            json.dump(begun(path).missing(), pipe)

    pid = fork(plan)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        units: list[int] = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return units


def fork(work: Callable[..., None], *given: Any, **options: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work(*given, **options)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def files(path: str) -> dict[str, bytes]:
    """A store's files; what kills left half-written is no matter."""
    found = {str(file.relative_to(path)): file for file in Path(path).rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in found.items() if not name.endswith(".partial")}


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def compare(path: str, rounds: int, moments: random.Random) -> int:
    """Stores of which each is filled by one to three ranks, one of which is killed at some moment, and then by one run;
    how many are the undisturbed store, byte for byte, of how many."""
    begun_at = time.monotonic()
    assert ended(fork(fill, f"{path}/undisturbed", 0, 1)) == 0
    took, expected = time.monotonic() - begun_at, files(f"{path}/undisturbed")
    units = list(range(-(-NUM_ROWS // CHUNK_ROWS)))
    kills = equal = 0
    while kills < rounds:
        out, world = f"{path}/killed", moments.randint(1, 3)
        pids = [fork(fill, out, rank, world, units) for rank in range(world)]
        time.sleep(moments.uniform(0, took))
        os.kill(pids[-1], signal.SIGKILL)
        ends = [ended(pid) for pid in pids]
        assert not any(ends[:-1]), "a rank that was not killed ended with an error"
        if ends[-1] == -signal.SIGKILL:
            assert ended(fork(fill, out, 0, 1)) == 0
            kills, found = kills + 1, files(out)
            differ = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            equal += not differ
            print(f"{kills} kills, each compared, {equal} equal {differ[:9] or ''}", flush=True)
        else:
            took *= 0.9  # it was made on a busier machine
        shutil.rmtree(out)
    return rounds - equal


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--together", type=int, default=0, help="runs on the same units at once")
    parser.add_argument("--freezes", type=int, default=0, help="stores PATH-0 and so on, each by a run that is stopped")
    parser.add_argument("--compare", type=int, default=0, help="stores in the folder PATH, a kill each, compared")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    moments = random.Random(given.seed)
    if given.compare:
        sys.exit(compare(given.path, given.compare, moments) != 0)
    kills = 0
    while kills < given.kills:
        todo = planned(given.path) if given.world > 1 else None
        pids = [fork(fill, given.path, rank, given.world, todo) for rank in range(given.world)]
        time.sleep(moments.uniform(0.0, 0.12))
        victim = pids[-1]
        os.kill(victim, signal.SIGKILL)
        _, status = os.waitpid(victim, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"after {kills} kills a rank had ended with {status} before it was killed; make the work longer")
        kills += 1
        for pid in pids[:-1]:  # the other ranks end their work undisturbed
            _, status = os.waitpid(pid, 0)
            if status:
                sys.exit(f"the rank that was not killed ended with {status}")
    if given.together:
        ends = [os.waitpid(pid, 0)[1] for pid in [fork(fill, given.path, 0, 1) for _ in range(given.together)]]
        print("ended with", *map(os.waitstatus_to_exitcode, ends))
    for number in range(given.freezes):  # one on another machine stands still, is given up, and comes back
        path = f"{given.path}-{number}"
        frozen = fork(fill, path, 0, 1, machine="elsewhere", timeout_s=0.6)
        while not list(Path(path).glob("status/lease/*.0")):
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.1))
        os.kill(frozen, signal.SIGSTOP)
        taker = fork(fill, path, 0, 1, timeout_s=0.6)
        taken = os.waitstatus_to_exitcode(os.waitpid(taker, 0)[1])
        os.kill(frozen, signal.SIGCONT)
        print("ended with", taken, os.waitstatus_to_exitcode(os.waitpid(frozen, 0)[1]), flush=True)
    # resumed on one rank, whatever their number was
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(fork(fill, given.path, 0, 1), 0)[1]))


if __name__ == "__main__":
    main()
