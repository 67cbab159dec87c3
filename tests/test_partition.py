"""Units cover every row once, shares are equal, batches stay inside a unit and waste little."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icons.partition import Partition, assign, form_batches, parse_shard, shard_of, slurm_array


@given(st.integers(0, 300), st.integers(1, 40))
def test_units_cover_every_row_once_in_order(num_rows: int, chunk_rows: int) -> None:
    partition = Partition(num_rows, chunk_rows)
    rows = [row for unit in range(partition.num_units) for row in partition.unit_rows(unit)]
    assert rows == list(range(num_rows))
    assert all(row in partition.unit_rows(partition.unit_of(row)) for row in rows)


def test_partition_names_what_is_out_of_range() -> None:
    partition = Partition(10, 4)
    with pytest.raises(IndexError, match=r"unit 3: expected 0 to 2 \(10 rows\)"):
        partition.unit_rows(3)
    with pytest.raises(IndexError, match="row 10: expected 0 to 9"):
        partition.unit_of(10)
    with pytest.raises(ValueError, match="got num_rows=3, chunk_rows=0; expected num_rows >= 0 and chunk_rows >= 1"):
        Partition(3, 0)


@given(st.lists(st.integers(0, 500), unique=True), st.integers(1, 9))
def test_workers_share_all_units_evenly(units: list[int], workers: int) -> None:
    shares = [assign(units, workers, worker) for worker in range(workers)]
    assert sorted(unit for share in shares for unit in share) == sorted(units)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shard_of_is_the_shard_to_which_assign_gives_a_unit() -> None:
    for shards in (1, 3, 200):
        for unit in range(50):
            assert unit in assign(range(50), shards, shard_of(unit, shards))


def test_worker_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match="worker 2 of 2: expected 0 to 1"):
        assign([0, 1], 2, 2)


@pytest.mark.parametrize("text", ["3", "3/3", "4/3", "-1/3", "a/b", "1/0", ""])
def test_shard_that_is_not_i_of_n_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"shard .*: expected I/N with 0 <= I < N, for example 3/200"):
        parse_shard(text)


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=60),
    st.integers(1, 12),
    st.one_of(st.none(), st.integers(1, 9000)),
    st.randoms(),
)
def test_batches_hold_every_row_once_within_both_limits(
    lengths: list[int], batch_size: int, max_tokens: int | None, shuffler: random.Random
) -> None:
    rows = list(range(100, 100 + len(lengths)))
    batches = form_batches(rows, lengths, batch_size, max_tokens)
    assert sorted(row for batch in batches for row in batch) == rows
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        longest = max(lengths[row - 100] for row in batch)
        assert max_tokens is None or len(batch) == 1 or longest * len(batch) <= max_tokens
    order = list(rows)
    shuffler.shuffle(order)
    assert form_batches(order, [lengths[row - 100] for row in order], batch_size, max_tokens) == batches


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "max_tokens", "below"),
    [(1024, 16, 16384, 0.02), (1024, 8, None, 0.02), (256, 8, None, 0.05)],
)
def test_padding_is_below_ten_percent_on_lengths_like_llavas(
    num_rows: int, batch_size: int, max_tokens: int | None, below: float
) -> None:
    """LLaVA-665K's mixture: 576 image tokens and a short or long conversation; 6 % text only; cut at 2,048."""
    generator = random.Random(0)
    lengths = []
    for _ in range(num_rows):
        text = int(generator.lognormvariate(5.0, 0.8))
        lengths.append(min(2048, text + (576 if generator.random() < 0.94 else 0)))
    batches = form_batches(range(num_rows), lengths, batch_size, max_tokens)
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
    assert 1 - sum(lengths) / padded < below
    in_file_order = form_batches(range(num_rows), [2048] * num_rows, batch_size)
    unsorted = sum(max(lengths[row] for row in batch) * len(batch) for batch in in_file_order)
    assert 1 - sum(lengths) / unsorted > 0.15, "what sorting saves"


def test_batch_limits_below_one_are_an_error() -> None:
    with pytest.raises(ValueError, match="got batch_size=0, max_tokens=None; expected both to be >= 1"):
        form_batches([1], [1], 0)
    with pytest.raises(ValueError, match="got batch_size=2, max_tokens=0"):
        form_batches([1], [1], 2, 0)


def test_slurm_array_of_nothing_is_empty() -> None:
    assert slurm_array([]) == ""
