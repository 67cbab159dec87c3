"""Rows -> write units -> ranks -> batches, in integers only.

A *write unit* is the set of rows of one chunk of the store. One rank owns a whole unit, and batches are formed inside a
unit from the lengths of its rows alone, so that what is stored does not depend on the number of ranks, on kills, or on
which of them resumes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Partition:
    """Rows `0 .. num_rows - 1` cut into units of `chunk_rows` rows; the last unit may be shorter.

    >>> partition = Partition(num_rows=10, chunk_rows=4)
    >>> partition.num_units, partition.unit_rows(2), partition.unit_of(7)
    (3, range(8, 10), 1)
    """

    num_rows: int
    chunk_rows: int

    def __post_init__(self) -> None:
        if self.num_rows < 0 or self.chunk_rows < 1:
            raise ValueError(
                f"partition: got num_rows={self.num_rows}, chunk_rows={self.chunk_rows}; expected num_rows >= 0 and "
                "chunk_rows >= 1"
            )

    @property
    def num_units(self) -> int:
        return -(-self.num_rows // self.chunk_rows)

    def unit_rows(self, unit: int) -> range:
        """The rows of one unit, ascending.

        Raises:
            IndexError: there is no such unit.
        """
        if not 0 <= unit < self.num_units:
            raise IndexError(f"unit {unit}: expected 0 to {self.num_units - 1} ({self.num_rows} rows)")
        start = unit * self.chunk_rows
        return range(start, min(start + self.chunk_rows, self.num_rows))

    def unit_of(self, row: int) -> int:
        """The unit that holds `row`.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row}: expected 0 to {self.num_rows - 1}")
        return row // self.chunk_rows


@runtime_checkable
class Claim(Protocol):
    """Asked at the start of a unit: True takes it; False: another run holds it (`patient`: after a look at whether that
    run is alive), or has finished it."""

    def __call__(self, unit: int, patient: bool = False) -> bool: ...


@dataclass(frozen=True)
class UnitPlan:
    """Who computes what: the units of one rank, and what must be asked before each. The writer makes it, the datamodule
    is given it, and the sampler goes through it.

    Attributes:
        partition: rows -> units of the store.
        units: the units that this rank computes, in this order.
        claim: asked at the start of each unit; False: another run holds it, leave it out. None: always True.
    """

    partition: Partition
    units: Sequence[int]
    claim: Claim | None = None

    @property
    def num_rows(self) -> int:
        return sum(len(self.partition.unit_rows(unit)) for unit in self.units)

    def claimed(self) -> Iterator[int]:
        """The units that this rank gets, each claimed when its turn comes. Those that another run holds are asked for
        once more at the end, patiently: by then their owners have been watched for some time."""
        if self.claim is None:
            yield from self.units
            return
        refused = []
        for unit in self.units:
            if self.claim(unit):
                yield unit
            else:
                refused.append(unit)
        for unit in refused:
            if self.claim(unit, patient=True):
                yield unit

    def union(self, other: "UnitPlan") -> "UnitPlan":
        """The units that are missing in one of two stores filled from one pass; each is asked whether it takes a unit.

        >>> UnitPlan(Partition(9, 2), [0, 3]).union(UnitPlan(Partition(9, 2), [3, 4])).units
        [0, 3, 4]
        """
        assert self.partition == other.partition

        def claim(unit: int, patient: bool = False) -> bool:
            asked = [plan.claim is None or plan.claim(unit, patient) for plan in (self, other)]
            return any(asked)

        return UnitPlan(self.partition, sorted({*self.units, *other.units}), claim)


def assign(units: Sequence[int], num_workers: int, worker: int) -> list[int]:
    """The units of one of `num_workers` equal workers (ranks, or shards): every `num_workers`-th, so counts differ by
    one at most.

    >>> [assign([0, 1, 2, 5, 6], 2, worker) for worker in range(2)]
    [[0, 2, 6], [1, 5]]
    """
    if not 0 <= worker < num_workers:
        raise ValueError(f"worker {worker} of {num_workers}: expected 0 to {num_workers - 1}")
    return list(units[worker::num_workers])


def shard_of(unit: int, num_shards: int) -> int:
    """The shard that computes `unit`, when all units are shared out with `assign`.

    >>> [unit for unit in range(7) if shard_of(unit, 3) == 1] == assign(range(7), 3, 1)
    True
    """
    return unit % num_shards


def parse_shard(text: str) -> tuple[int, int]:
    """`I/N`, the I-th (from 0) of N independent shares of the units.

    >>> parse_shard("3/200")
    (3, 200)
    """
    index, _, count = text.partition("/")
    if not (index.strip().isdecimal() and count.strip().isdecimal() and int(index) < int(count)):
        raise ValueError(f"shard {text!r}: expected I/N with 0 <= I < N, for example 3/200 (I counts from 0)")
    return int(index), int(count)


def form_batches(
    rows: Sequence[int], lengths: Sequence[int], batch_size: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Cuts the rows of one unit into batches, longest rows together, so that little is padding.

    Rows are sorted by length (longest first; ties by row, ascending) and taken in this order while a batch has at most
    `batch_size` rows and at most `max_tokens` tokens, padding included. A row longer than `max_tokens` is a batch of
    its own.

    >>> form_batches([4, 5, 6, 7], [10, 30, 10, 29], batch_size=2)
    [[5, 7], [4, 6]]
    >>> form_batches([4, 5, 6, 7], [10, 30, 10, 29], batch_size=4, max_tokens=59)
    [[5], [7, 4], [6]]
    """
    if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"batches: got batch_size={batch_size}, max_tokens={max_tokens}; expected both to be >= 1")
    length_of = dict(zip(rows, lengths, strict=True))
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-length_of[row], row)):
        longest = length_of[batches[-1][0]] if batches else 0
        full = not batches or len(batches[-1]) == batch_size
        if full or (max_tokens is not None and longest * (len(batches[-1]) + 1) > max_tokens):
            batches.append([])
        batches[-1].append(row)
    return batches


def slurm_array(indices: Sequence[int]) -> str:
    """Indices as SLURM's `--array` takes them.

    >>> slurm_array([0, 1, 2, 3, 7, 9, 10])
    '0-3,7,9-10'
    """
    spans: list[list[int]] = []
    for index in sorted(set(indices)):
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
