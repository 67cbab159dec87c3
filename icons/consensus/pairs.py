"""Products of every training row with every validation row, in a temporary file: rules read them again and again."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icons.consensus.origin import check_same, scorer_of
from icons.scores import Scorer
from icons.store import ScoreStore

_BLOCK_NUMBERS = 1 << 24


class PairBlock(NamedTuple):
    """Products of some consecutive rows: name of the validation file's task -> `[n, M]`, NaN for failed rows."""

    rows: range
    products: Mapping[str, Float[np.ndarray, "block validation"]]


class Pairs:
    """Every training row's product with every usable validation row.

    They lie in a temporary file (`$TMPDIR`), 2 N M bytes; 4 N M where rows are not normalised, since products may then
    be too large for half precision. In memory is one block. Failed validation rows are left out.

    Args:
        num_rows: training rows.
        tasks: names of the tasks.
        blocks: the products, all rows in order.
        members: task -> the validation files it is made of; default: one of its own name. Files of one task weigh
            equally in it.
        dtype: of the file.

    Attributes:
        task: `[M]` place of each validation row's task in `tasks`.
        share: `[M]` float64, what each validation row weighs in its task; sums to 1 over a task.
        done: `[N]` rows that have products; a failed row reads as zeros.

    Raises:
        ValueError: a task none of whose validation rows is usable, or no training row is.

    >>> with Pairs.of_arrays({"qa": np.array([[1.0, 0.0], [0.5, 0.25]])}, ["qa"]) as pairs:
    ...     pairs.rows([1]).tolist(), pairs.share.tolist()
    ([[0.5, 0.25]], [0.5, 0.5])
    """

    def __init__(
        self,
        num_rows: int,
        tasks: Sequence[str],
        blocks: Iterable[PairBlock],
        members: Mapping[str, Sequence[str]] | None = None,
        dtype: str = "float16",
    ) -> None:
        self.num_rows, self.tasks, self.dtype = num_rows, list(tasks), np.dtype(dtype)
        self.members = {task: list((members or {}).get(task, [task])) for task in self.tasks}
        self.done = np.zeros(num_rows, bool)
        self.folder = tempfile.TemporaryDirectory(prefix="icons-pairs-")
        self.path = Path(self.folder.name) / "pairs"
        self.task, self.share = np.empty(0, np.int64), np.empty(0)
        try:
            self.write(blocks)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_arrays(
        cls, products: Mapping[str, Float[np.ndarray, "_ _"]], tasks: Sequence[str], dtype: str = "float16"
    ) -> "Pairs":
        """From arrays `[N, M]`, one per task; NaN: the training row, or the validation row, failed.

        Raises:
            ValueError: a task without an array, or arrays with different numbers of rows.
        """
        lengths = {name: len(array) for name, array in products.items()}
        if set(lengths) != set(tasks) or len(set(lengths.values())) != 1:
            raise ValueError(f"products: got rows {lengths}; expected an array [N, M] for each of {', '.join(tasks)}")
        num_rows = next(iter(lengths.values()))
        width = sum(array.shape[1] for array in products.values())
        blocks = (
            PairBlock(rows, {name: array[rows.start : rows.stop] for name, array in products.items()})
            for rows in _pieces(num_rows, width)
        )
        return cls(num_rows, tasks, blocks, dtype=dtype)

    @classmethod
    def of_gradients(cls, scorer: Scorer, groups: Mapping[str, Sequence[str]] | None = None) -> "Pairs":
        """From gradients, with a scorer made with `pairwise` and these groups: one pass over the training rows."""
        blocks = (
            PairBlock(part.rows, {name: pairs.numpy() for name, pairs in part.pairs.items()})
            for part in scorer.score(range(scorer.num_rows))
        )
        plain = "none" in (scorer.normalize, scorer.task_normalize)
        return cls(scorer.num_rows, scorer.tasks, blocks, groups, "float32" if plain else "float16")

    @classmethod
    def of_store(
        cls, store: ScoreStore, train: Sequence[str] | None = None, tasks: Mapping[str, Sequence[str]] | None = None
    ) -> "Pairs":
        """Of a score store: those it holds (`icons influence --pairwise`), or else from its gradient stores.

        Args:
            store: the score store.
            train: gradient stores of the training rows, one per checkpoint; default: those in its manifest.
            tasks: task -> gradient stores of its validation rows, likewise.

        Raises:
            ValueError: the score store names no gradient stores (`icons score` makes none); or one is not there, or
                not the one the scores were made from.
        """
        facts = store.facts
        members = {task: facts.members(task) for task in store.tasks}
        names = [name for some in members.values() for name in some]
        if cls.are_in(store):
            plain = "none" in (facts.normalize, facts.task_normalize)
            return cls(store.num_rows, store.tasks, _stored(store, names), members, "float32" if plain else "float16")
        return cls.of_gradients(scorer_of(store, train, tasks, pairwise=True), facts.groups)

    @staticmethod
    def are_in(store: ScoreStore) -> bool:
        """Whether a score store holds products with single validation rows of all its tasks."""
        facts = store.facts
        return all(f"pairwise_{name}" in store.arrays for task in store.tasks for name in facts.members(task))

    @property
    def width(self) -> int:
        """M: usable validation rows of all tasks."""
        return len(self.task)

    def write(self, blocks: Iterable[PairBlock]) -> None:
        usable: Bool[np.ndarray, " all"] | None = None
        names = [name for some in self.members.values() for name in some]
        with self.path.open("wb", buffering=1 << 22) as file:
            waiting = 0  # failed rows before the first that tells which validation rows are usable
            for block in blocks:
                whole = np.concatenate([np.asarray(block.products[name], np.float32) for name in names], axis=1)
                finite = np.isfinite(whole)
                done = finite.any(axis=1)
                if usable is None:
                    if not done.any():
                        waiting += len(whole)
                        continue
                    usable = finite[int(done.argmax())]
                    self.weigh(usable, {name: block.products[name].shape[1] for name in names})
                    file.write(bytes(waiting * self.width * self.dtype.itemsize))
                part = whole[:, usable]
                self.done[block.rows.start : block.rows.stop] = np.isfinite(part).all(axis=1)
                part[~self.done[block.rows.start : block.rows.stop]] = 0
                file.write(part.astype(self.dtype).tobytes())
        if usable is None:
            raise ValueError("products of training and validation rows: no training row has any; all have failed")

    def weigh(self, usable: Bool[np.ndarray, " all"], sizes: Mapping[str, int]) -> None:
        task, share, start = [], [], 0
        for column, (name, members) in enumerate(self.members.items()):
            counts = []
            for member in members:
                counts.append(int(usable[start : start + sizes[member]].sum()))
                start += sizes[member]
            if not any(counts):
                raise ValueError(f"task {name}: none of its validation rows is usable; expected at least one")
            filled = sum(count > 0 for count in counts)
            task += [np.full(sum(counts), column, np.int64)]
            share += [np.full(count, 1 / count / filled) for count in counts if count]
        self.task, self.share = np.concatenate(task), np.concatenate(share)

    def blocks(self) -> Iterator[tuple[slice, Float[Tensor, "block validation"]]]:
        """All products, float32, some consecutive rows at a time."""
        with self.path.open("rb") as file:
            for rows in _pieces(self.num_rows, self.width):
                part = np.fromfile(file, self.dtype, len(rows) * self.width)
                assert part.size == len(rows) * self.width, "the file of products is shorter than it was written"
                yield slice(rows.start, rows.stop), torch.from_numpy(part).view(len(rows), self.width).float()

    def rows(self, rows: Sequence[int] | Int[np.ndarray, " some"]) -> Float[np.ndarray, "some validation"]:
        """Products of the given rows, float32."""
        # read, not mapped: a mapped file's neighbouring pages count as this process's memory, up to the whole file
        wanted = np.asarray(rows, np.int64)
        products = np.empty((len(wanted), self.width), self.dtype)
        with self.path.open("rb", buffering=0) as file:
            for index in np.argsort(wanted).tolist():
                file.seek(int(wanted[index]) * products.itemsize * self.width)
                assert file.readinto(products[index]) == products.itemsize * self.width, "the file of products is short"
        return products.astype(np.float32)

    def total(self, rows: Int[np.ndarray, " some"], positive: bool = False) -> Float[np.ndarray, " validation"]:
        """Sum of the given rows' products (or of their positive parts), float64."""
        total = np.zeros(self.width)
        for part in _pieces(len(rows), self.width):
            products = self.rows(rows[part.start : part.stop])
            total += (np.maximum(products, 0) if positive else products).sum(axis=0, dtype=np.float64)
        return total

    def weighted(self, weights: Float[np.ndarray, " validation"]) -> Float[np.ndarray, " rows"]:
        """Each row's weighted sum of products, float32; equal rows have equal sums, wherever they stand."""
        scores, factor = np.empty(self.num_rows, np.float32), torch.from_numpy(weights).float()
        for rows, block in self.blocks():
            scores[rows] = block.mul_(factor).sum(dim=1).numpy()
        return scores

    def close(self) -> None:
        self.folder.cleanup()

    def __enter__(self) -> "Pairs":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _pieces(num_rows: int, width: int) -> Iterator[range]:
    """Consecutive ranges of rows whose products are some 64 MB in float32."""
    step = max(1, _BLOCK_NUMBERS // max(width, 1))
    return (range(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _stored(store: ScoreStore, names: Sequence[str]) -> Iterator[PairBlock]:
    """The products that a score store holds."""
    for unit in range(store.partition.num_units):
        rows = store.partition.unit_rows(unit)
        span = slice(rows.start, rows.stop)
        yield PairBlock(rows, {name: store.stored(f"pairwise_{name}", span) for name in names})


def pairs_behind(
    given: Pairs | Mapping[str, Float[np.ndarray, "_ _"]] | None,
    scores: Any,
    gradients: Callable[[bool], Scorer],
    num_rows: int,
    tasks: Sequence[str],
    stack: ExitStack,
) -> Pairs:
    """Products with single validation rows; those made here are closed by `stack`.

    Raises:
        ValueError: they are neither given nor to be had, or they are of other rows or tasks.
    """
    if isinstance(given, Pairs):
        opened = given
    elif given is not None:
        opened = stack.enter_context(Pairs.of_arrays(given, tasks))
    elif hasattr(scores, "pairs"):
        opened = scores.pairs()  # the caller's to close
    elif isinstance(scores, ScoreStore) and Pairs.are_in(scores):
        opened = stack.enter_context(Pairs.of_store(scores))
    else:
        scorer = gradients(True)
        groups = scores.facts.groups if isinstance(scores, ScoreStore) else {}
        opened = stack.enter_context(Pairs.of_gradients(scorer, groups))
    check_same("products", opened, num_rows, tasks)
    return opened
