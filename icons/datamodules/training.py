"""The batches of a fit: shuffled by epoch, one modality to a batch, like lengths together, as LLaVA trains."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from icons.datamodules.conversation import Conversation
from icons.datamodules.failed_row import FailedRowError
from icons.interruption import ignore


class TrainingSampler(Sampler[list[int]]):
    """Batches of one rank, epoch by epoch.

    Each step's rows, for all ranks together, are one modality (with image, or without) and are dealt to the ranks so
    that these get about the same length. What does not fill a step is put together, whatever its modality, at the end
    of the epoch. Every row comes once an epoch, but for a last step with fewer rows than ranks, which repeats some: all
    ranks make the same number of steps.

    The order follows from seed and epoch alone: it is the same on every rank, and after a resume.

    Args:
        rows: the rows to train on.
        lengths: a number per row that grows with its length.
        with_image: per row, whether it has an image.
        batch_size: rows per rank and step.
        rank, world_size: which rank of how many.
        seed: of the order.

    Source: haotian-liu/LLaVA, llava/train/llava_trainer.py, LengthGroupedSampler with group_by_modality.
    """

    def __init__(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        with_image: Sequence[bool],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.rows, self.lengths = np.asarray(rows, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
        self.with_image = np.asarray(with_image, dtype=bool)
        assert len(self.rows) == len(self.lengths) == len(self.with_image)
        self.batch_rows, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self.epoch = self.skip = 0
        self.sampler = self  # where Lightning looks for `set_epoch`

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.batch_rows * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        for places in self.steps()[skip:]:
            yield self.rows[self.deal(places)].tolist()

    def steps(self) -> list[np.ndarray]:
        """The epoch's steps: places in `rows`, for all ranks together."""
        random = np.random.default_rng([self.seed, self.epoch])
        size = self.batch_rows * self.world_size
        whole: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for image in (True, False):
            places = random.permutation(np.flatnonzero(self.with_image == image))
            full = len(places) // size * size
            whole += [places[begin : begin + size] for begin in range(0, full, size)]
            rest.append(places[full:])
        ordered = [whole[step] for step in random.permutation(len(whole))]
        left = np.concatenate(rest)
        return ordered + [left[begin : begin + size] for begin in range(0, len(left), size)]

    def deal(self, places: np.ndarray) -> np.ndarray:
        """This rank's part of a step: longest rows first, each to the rank with least so far that has room."""
        if len(places) < self.world_size:
            places = np.resize(places, self.world_size)
        room = [
            len(places) // self.world_size + (rank < len(places) % self.world_size) for rank in range(self.world_size)
        ]
        filled = [0] * self.world_size
        hands: list[list[int]] = [[] for _ in room]
        for index in places[np.argsort(-self.lengths[places], kind="stable")].tolist():
            rank = min((r for r in range(self.world_size) if len(hands[r]) < room[r]), key=lambda r: (filled[r], r))
            hands[rank].append(index)
            filled[rank] += int(self.lengths[index])
        return np.asarray(hands[self.rank], dtype=np.int64)


class TrainingLoader(DataLoader[Any]):
    """A data loader that remembers its place: Lightning keeps `state_dict()` in a fit's checkpoints.

    Args:
        dataset: indexed by row.
        sampler: the batches.
        options: further arguments of torch's DataLoader.
    """

    def __init__(self, dataset: Dataset[Any], sampler: TrainingSampler, **options: Any) -> None:
        self.order, self.given = sampler, 0
        super().__init__(dataset, batch_sampler=sampler, worker_init_fn=ignore, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.given = self.order.skip
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches given out of the epoch that has begun; a finished epoch leaves nothing to skip."""
        return {"given": self.given % max(1, len(self.order))}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.skip = state["given"]


def modality_and_length(read: Callable[[int], Conversation], rows: Sequence[int]) -> tuple[list[bool], list[int]]:
    """Whether each row has an image, and its number of words, by which LLaVA groups; a broken record has none."""
    with_image, words = [], []
    for row in rows:
        try:
            conversation = read(row)
        except FailedRowError:
            conversation = None
        with_image.append(conversation is not None and bool(conversation.images))
        words.append(0 if conversation is None else conversation.num_words)
    return with_image, words
