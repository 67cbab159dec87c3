"""Leases: which run is computing which unit, so that two runs on one store never compute the same one.

A lease is a small file `status/lease/<unit>.<generation>`, made by an atomic "create unless it exists"; the highest
generation holds the unit. A dead owner's unit is taken over by making the next generation, which again only one run can
do. An owner on this machine is dead when its process is gone. For one elsewhere clocks are not compared, since they may
differ: its lease holds a counter that it raises every few seconds, and an owner whose counter has stood still for
`timeout_s` of *our* clock counts as dead.

Several machines have not been at hand: the tests play them in one process, with other machines' names in the leases,
and with an object store on the loopback address. On a shared folder leases rely on what its file system promises for a
hard link that fails if its name exists (NFS and Lustre do).

An owner that was given up may come back (a machine that had frozen). It owns the unit only while the highest generation
is its own: the taker has made a higher one, and in the end removes both, after the unit's `status` is there; a lease
that has gone is neither ours nor made again. So whoever comes back finds a higher lease, none, or a finished unit, and
writes nothing.

The generations of a unit that is not done have no gap, since only the highest is given back before the unit is done: a
lease is the highest where the next generation is not there. To look for that one name is much cheaper than to list all
leases, and a writer asks before each file.

A lease that cannot be read is a dead one: leases are not made durable, and a loss of power may leave them empty.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Protocol, runtime_checkable

from icons.process import machine, start_time

_PREFIX = "status/lease"
_BEATS_PER_TIMEOUT = 6


@runtime_checkable
class Keys(Protocol):
    """The few operations on keys that leases need; `icons.store.storage.Storage` has them."""

    def get(self, key: str) -> bytes | None: ...
    def put(self, key: str, value: bytes) -> None: ...
    def put_new(self, key: str, value: bytes) -> bool: ...
    def exists(self, key: str) -> bool: ...
    def delete(self, key: str) -> None: ...
    def list(self, prefix: str) -> list[str]: ...


@dataclass(frozen=True)
class Holder:
    """Who holds a unit, as its lease says."""

    owner: str
    machine: str
    pid: int
    started: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.machine.partition('/')[0]}"

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> "Holder | None":
        """None: not a lease, or half of one."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None


class Leases:
    """The leases of one run (of one rank) on one store.

    Args:
        keys: the store's storage.
        timeout_s: how long the counter of an owner on another machine must stand still for its unit to be taken over.
    """

    def __init__(self, keys: Keys, timeout_s: float = 90.0) -> None:
        self.keys, self.timeout_s = keys, timeout_s
        self.me = Holder(uuid.uuid4().hex, machine(), os.getpid(), start_time(os.getpid()))
        self.held: dict[int, int] = {}  # unit -> generation
        self.seen: dict[str, tuple[int, float]] = {}  # lease -> counter, and when we first saw it at that value
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.hurried = False  # set by signal handlers, in which an Event may wait for itself
        self.thread: threading.Thread | None = None

    def acquire(self, unit: int) -> bool:
        """Takes the lease of `unit`, also from a dead owner; False if another run, or another writer here, holds it."""
        if unit in self.held:
            return True
        generation = self.latest(unit)
        if generation >= 0 and (holder := self.read(unit, generation)) is not None and self.is_alive(holder):
            return False
        return self.take(unit, generation + 1)

    def take(self, unit: int, generation: int) -> bool:
        """Makes the lease of this generation, unless somebody has."""
        with self.lock:
            if not self.keys.put_new(lease_key(unit, generation), self.me.to_bytes()):
                return False
            self.held[unit] = generation
        self.start_beating()
        return True

    def acquire_patiently(self, unit: int) -> bool:
        """As `acquire`, but watches an owner elsewhere until its counter moves (then False) or it is given up; not for
        longer once `hurried` is set."""
        first = self.holder(unit)
        while not self.acquire(unit):
            holder = self.holder(unit)
            if holder is None or first is None or holder.owner != first.owner:
                first = holder
            elif holder.machine == self.me.machine or holder.beat != first.beat:
                return False
            if self.hurried or self.closed.wait(self.timeout_s / 30):
                return False
        return True

    def holder(self, unit: int) -> Holder | None:
        """Who holds `unit` now; None: nobody."""
        generation = self.latest(unit)
        return None if generation < 0 else self.read(unit, generation)

    def owns(self, unit: int) -> bool:
        """Whether the lease of `unit` is still ours: there, and nobody has taken it over."""
        generation = self.held.get(unit)
        return generation is not None and self.is_mine(unit, generation) and not self.is_taken_over(unit, generation)

    def is_taken_over(self, unit: int, generation: int) -> bool:
        return self.keys.exists(lease_key(unit, generation + 1))

    def is_mine(self, unit: int, generation: int) -> bool:
        holder = self.read(unit, generation)
        return holder is not None and holder.owner == self.me.owner

    def release(self, unit: int, done: bool) -> None:
        """Gives a unit back, if it is still ours. `done` also removes what dead owners left of it."""
        with self.lock:
            generation = self.held.pop(unit, None)
            if generation is None or not self.is_mine(unit, generation):
                return
            if not done and self.is_taken_over(unit, generation):
                return  # it would leave a gap, behind which an older owner would take itself for the only one
            for old in range(generation, -1 if done else generation - 1, -1):
                self.keys.delete(lease_key(unit, old))

    def close(self) -> None:
        """Gives everything back that is still held, as not done."""
        self.closed.set()
        if self.thread is not None:
            self.thread.join()
        for unit in list(self.held):
            self.release(unit, done=False)

    def sweep(self, is_done: Callable[[int], bool]) -> None:
        """Removes the leases of units that are done and whose owners all died before they could, the highest first."""
        leases: dict[int, list[int]] = {}
        for key in self.keys.list(_PREFIX):
            unit, _, generation = key.rpartition("/")[2].partition(".")
            if unit.isdigit() and generation.isdigit() and is_done(int(unit)):
                leases.setdefault(int(unit), []).append(int(generation))
        for of_unit, generations in leases.items():
            holders = [self.read(of_unit, each) for each in generations]
            if not any(holder is not None and self.is_alive(holder) for holder in holders):
                for old in sorted(generations, reverse=True):
                    self.keys.delete(lease_key(of_unit, old))

    def latest(self, unit: int) -> int:
        """The generation that holds a unit; -1: none."""
        return max(self.generations(unit), default=-1)

    def living(self) -> Holder | None:
        """Some owner, elsewhere or here, that may be computing now."""
        holders = (Holder.from_bytes(self.keys.get(key) or b"") for key in self.keys.list(_PREFIX))
        return next((holder for holder in holders if holder is not None and self.is_alive(holder)), None)

    def generations(self, unit: int) -> list[int]:
        prefix = lease_key(unit, "")
        return [int(key[len(prefix) :]) for key in self.keys.list(_PREFIX) if key.startswith(prefix)]

    def read(self, unit: int, generation: int) -> Holder | None:
        text = self.keys.get(lease_key(unit, generation))
        return None if text is None else Holder.from_bytes(text)

    def is_alive(self, holder: Holder) -> bool:
        if holder.machine == self.me.machine:
            return start_time(holder.pid) == holder.started
        now = time.monotonic()
        beat, since = self.seen.setdefault(holder.owner, (holder.beat, now))
        if holder.beat != beat:
            self.seen[holder.owner] = (holder.beat, now)
            return True
        return now - since < self.timeout_s

    def start_beating(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self.beat, name="icons-leases", daemon=True)
            self.thread.start()

    def beat(self) -> None:
        """Raises the counter of every lease that is held, until `close`."""
        count = 0
        while not self.closed.wait(self.timeout_s / _BEATS_PER_TIMEOUT):
            count += 1
            with self.lock:
                for unit, generation in self.held.items():
                    # A lost beat costs nothing: at worst the unit is taken over, which the owner notices before it
                    # writes; and what keeps beats from being written will stop the writer, with its reason.
                    # One that has gone belongs to nobody: it must not be made again.
                    with suppress(Exception):
                        if not self.is_mine(unit, generation):
                            continue
                        self.keys.put(lease_key(unit, generation), replace(self.me, beat=count).to_bytes())


def lease_key(unit: int, generation: int | str) -> str:
    return f"{_PREFIX}/{unit}.{generation}"
