"""The batches of a fit: every row once, one modality a step, like lengths together, the same after a resume."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from icons.datamodules.conversation import Conversation
from icons.datamodules.dialects import DIALECTS, read_conversation
from icons.datamodules.training import TrainingLoader, TrainingSampler, modality_and_length


def samplers(num_rows: int, images: int, batch_size: int, world_size: int, seed: int = 0) -> list[TrainingSampler]:
    rows = [10 * row for row in range(num_rows)]
    lengths = np.random.default_rng(1).integers(1, 100, num_rows).tolist()
    with_image = [row < images for row in range(num_rows)]
    return [
        TrainingSampler(rows, lengths, with_image, batch_size, rank, world_size, seed) for rank in range(world_size)
    ]


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    share=st.floats(0, 1),
    batch_size=st.integers(1, 6),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_row_once_and_as_many_steps_on_every_rank(
    num_rows: int, share: float, batch_size: int, world_size: int, epoch: int
) -> None:
    images = int(share * num_rows)
    ranks = samplers(num_rows, images, batch_size, world_size)
    for sampler in ranks:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in ranks]
    assert {len(found) for found in batches} == {len(ranks[0])}
    seen = [row for found in batches for batch in found for row in batch]
    assert set(seen) == {10 * row for row in range(num_rows)}
    assert len(seen) - num_rows < world_size  # repeats fill a last step that has fewer rows than ranks
    assert all(0 < len(batch) <= batch_size for found in batches for batch in found)
    for step in list(zip(*batches, strict=True))[: images // (batch_size * world_size)]:
        assert len({row < 10 * images for batch in step for row in batch}) == 1 or len(step[0]) < batch_size


def test_steps_are_one_modality_until_the_rest() -> None:
    (sampler,) = samplers(num_rows=50, images=27, batch_size=5, world_size=1)
    kinds = [{row < 270 for row in batch} for batch in sampler]
    assert [len(kind) for kind in kinds[:-1]] == [1] * 9  # 5 of images, 4 of text; 2 and 3 are left over
    assert len(kinds[-1]) == 2


def test_ranks_get_about_the_same_length() -> None:
    ranks = samplers(num_rows=160, images=160, batch_size=8, world_size=4)
    lengths = dict(zip(ranks[0].rows.tolist(), ranks[0].lengths.tolist(), strict=True))
    for step in zip(*ranks, strict=True):
        sums = [sum(lengths[row] for row in batch) for batch in step]
        assert max(sums) - min(sums) <= max(lengths.values())
        for batch in step:
            assert [lengths[row] for row in batch] == sorted((lengths[row] for row in batch), reverse=True)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    (one,), (same,), (other,) = (samplers(40, 20, 4, 1, seed) for seed in (0, 0, 1))
    first = list(one)
    assert first == list(same) and first != list(other)
    one.set_epoch(1)
    assert list(one) != first
    one.set_epoch(0)
    assert list(one) == first


class Rows(Dataset[int]):
    def __getitem__(self, row: int) -> int:
        return row


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_goes_on_where_it_was(workers: int) -> None:
    def loader() -> Any:
        (sampler,) = samplers(30, 15, 4, 1)
        options: dict[str, Any] = {"num_workers": workers, "collate_fn": list}
        return TrainingLoader(Rows(), sampler, **options)

    whole = list(loader())
    begun = loader()
    stream = iter(begun)
    assert [next(stream) for _ in range(3)] == whole[:3]
    resumed = loader()
    resumed.load_state_dict(begun.state_dict())
    assert len(resumed) == len(whole) == 8
    assert list(resumed) == whole[3:]
    assert resumed.state_dict() == {"given": 0}
    assert list(resumed) == whole  # the next epoch is a whole one


def test_modality_and_words_are_counted() -> None:
    lines = [
        b'{"image": "a.png", "conversations": [{"from": "human", "value": "<image> What is it?"}, '
        b'{"from": "gpt", "value": "A cat."}]}',
        b'{"image": "none", "conversations": [{"from": "human", "value": "Hello"}]}',
        b'{"image": "b.png"}',
        b"[]",
        b'{"conversations": [{"from": "human", "value": null}]}',
    ]

    def read(row: int) -> Conversation:
        return read_conversation(msgspec.json.decode(lines[row]), DIALECTS["llava"])

    assert modality_and_length(read, range(5)) == ([True, False, False, False, False], [6, 1, 0, 0, 0])
