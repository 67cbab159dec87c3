"""Rows of gradients from a store or an array, block by block, the next block read while this one is worked on."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from icons.batch import Status
from icons.partition import Partition

BLOCK_ROWS = 512
_READ_AHEAD = 2


@runtime_checkable
class StoredRows(Protocol):
    """What a gradient store offers: its arrays, consecutive rows of each, and its manifest."""

    @property
    def gradients(self) -> Any: ...
    @property
    def partition(self) -> Partition: ...
    @property
    def manifest(self) -> Mapping[str, Any]: ...

    def stored(self, name: str, rows: slice) -> np.ndarray: ...


Source: TypeAlias = StoredRows | Shaped[np.ndarray, "_ _"] | Shaped[Tensor, "_ _"]


class ArrayRows:
    """An array in the shape of a store: rows are done, norms are their own, nothing is known of their origin."""

    scale = None

    def __init__(self, rows: Shaped[np.ndarray, "rows dim"] | Shaped[Tensor, "rows dim"]) -> None:
        array = rows.detach().cpu() if isinstance(rows, Tensor) else rows
        if isinstance(array, Tensor):
            array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
        if array.ndim != 2:
            raise ValueError(f"gradients: got shape {array.shape}; expected [rows, dim]")
        self.gradients = array
        self.manifest: Mapping[str, Any] = {}
        self.partition = Partition(len(array), BLOCK_ROWS)
        self.status = np.full(len(array), Status.DONE, np.uint8)
        self.norm = np.linalg.norm(array.astype(np.float32, copy=False), axis=1)

    def stored(self, name: str, rows: slice) -> np.ndarray:
        return np.asarray(getattr(self, name)[rows])

    def __repr__(self) -> str:
        return f"an array of shape {self.gradients.shape}"


class Block(NamedTuple):
    """Some consecutive rows.

    `gradient [n, K]` is float32 on the device asked for, without its scale; it is overwritten by the next block.
    `length [n]` is its norm; `scale [n]` turns it into the stored gradient; `norm [n]` is the norm before projection;
    `done [n]` tells rows that hold a gradient.
    """

    rows: range
    gradient: Float[Tensor, "block dim"]
    length: Float[Tensor, " block"]
    scale: Float[Tensor, " block"]
    norm: Float[Tensor, " block"]
    done: Bool[Tensor, " block"]


def as_rows(source: Source) -> StoredRows:
    """A store as it is, an array in the shape of one.

    Raises:
        ValueError: the store's rows are losses, which have no direction.
    """
    if isinstance(source, np.ndarray | Tensor):
        return ArrayRows(source)
    if source.manifest.get("collect") == "loss":
        raise ValueError(
            f"store {getattr(source, 'path', source)}: holds losses alone (--collect loss), whose cosines say nothing; "
            "expected gradients or representations"
        )
    return source


def ranges(rows: range, source: StoredRows) -> list[range]:
    """Consecutive pieces of `rows` that end where the source's chunks end."""
    step = source.partition.chunk_rows
    edges = [rows.start, *range((rows.start // step + 1) * step, rows.stop, step), rows.stop]
    return [range(start, stop) for start, stop in pairwise(edges)]


def blocks(source: StoredRows, pieces: Sequence[range], device: torch.device) -> Iterator[Block]:
    """The given pieces of a source, in order, reading ahead in one thread."""
    buffer = Buffer(device)
    with ThreadPoolExecutor(1) as reader:
        waiting = [reader.submit(read, source, rows) for rows in pieces[:_READ_AHEAD]]
        for index in range(len(pieces)):
            raw = waiting.pop(0).result()
            if index + _READ_AHEAD < len(pieces):
                waiting.append(reader.submit(read, source, pieces[index + _READ_AHEAD]))
            yield buffer.fill(raw)


class RawBlock(NamedTuple):
    rows: range
    gradient: np.ndarray
    scale: np.ndarray
    norm: np.ndarray
    status: np.ndarray


def read(source: StoredRows, rows: range) -> RawBlock:
    """One piece as it is stored."""
    part = slice(rows.start, rows.stop)
    scaled = getattr(source, "scale", None) is not None
    scale = source.stored("scale", part) if scaled else np.ones(len(rows), np.float32)
    gradient, norm, status = (source.stored(name, part) for name in ("gradients", "norm", "status"))
    return RawBlock(rows, gradient, scale, norm, status)


class Buffer:
    """Turns raw blocks into float32 in one piece of memory that is used again: fresh pages cost more than the copy.

    torch converts, since numpy turns float16 into float32 several times slower.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = torch.empty(0, device=device)

    def fill(self, raw: RawBlock) -> Block:
        stored = torch.from_numpy(np.ascontiguousarray(raw.gradient))
        if self.memory.numel() < stored.numel():
            self.memory = torch.empty(stored.numel(), dtype=torch.float32, device=self.device)
        gradient = self.memory[: stored.numel()].view(stored.shape)
        gradient.copy_(stored.to(self.device))  # moved as it is stored, then converted
        return Block(
            raw.rows,
            gradient,
            gradient.norm(dim=1),
            torch.as_tensor(raw.scale, dtype=torch.float32, device=self.device),
            torch.as_tensor(raw.norm, dtype=torch.float32, device=self.device),
            torch.as_tensor(raw.status == Status.DONE, device=self.device),
        )
