"""Sums over all entries of a parameter, right to float32's last digits: of parts, then of the parts' sums.

A matrix product with few rows adds up one entry after the other on a CPU, in one float32: after 700,000 squares it is
3e-4 off, and an adapter of LLaVA's has millions.
"""

from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor

PART = 1 << 13  # entries that are added up one by one
RUN = 1 << 10  # squares that are added up by eight or more adders side by side
_SQUARES = 1e-28, 1e34  # of a norm that lies between, all squares that count are whole float32
CACHED = 1 << 18  # entries that are gone through several times on a CPU: 1 MB
LARGE = 1 << 21  # entries of a block that is gone through in pieces: 8 MB


def samples_at_a_time(size: int, entries: int, device: torch.device) -> list[slice]:
    """The `size` samples of a block, in pieces that a CPU's cache holds, where the block is larger than that; else all
    at once: what goes over each of a sample's entries several times then reads it from memory once.

    >>> samples_at_a_time(3, 10**6, torch.device("cpu")), samples_at_a_time(3, 10**6, torch.device("cuda"))
    ([slice(0, 1, None), slice(1, 2, None), slice(2, 3, None)], [slice(0, 3, None)])
    """
    if device.type != "cpu" or size * entries <= LARGE:
        return [slice(0, size)]
    rows = max(1, CACHED // entries)
    return [slice(begin, min(begin + rows, size)) for begin in range(0, size, rows)]


class SquaredNorms:
    """The squares of samples' norms over all parameters, put together from those of blocks.

    Args:
        size: samples.
        names: of all parameters.
        device: of the blocks.
    """

    def __init__(self, size: int, names: Collection[str], device: torch.device) -> None:
        self._column = {name: number for number, name in enumerate(names)}
        wide = torch.float64 if device.type == "cpu" else torch.float32
        self._numbers = torch.zeros(size, len(names), device=device, dtype=wide)

    def put(self, name: str, block: Float[Tensor, " rows *shape"], rows: slice) -> None:
        """Of one parameter and some samples; what was put there before is forgotten."""
        if self._numbers.device.type == "cpu":
            self._numbers[rows, self._column[name]] = squared_norm(block)
        else:
            torch.linalg.vector_norm(block[:, None].flatten(1), dim=1, out=self.norms_of(name, rows))

    def norms_of(self, name: str, rows: slice) -> Float[Tensor, " rows"]:
        """On a GPU, where the norms themselves of one parameter and some samples are put."""
        return self._numbers[rows, self._column[name]]

    def norm(self) -> Float[Tensor, " batch"]:
        """Of each sample, float32. On a CPU it is right wherever float32 holds it; on a GPU from 1e-19 to 1e19."""
        squares = self._numbers if self._numbers.device.type == "cpu" else self._numbers.square()
        return squares.sum(dim=1).sqrt().float()


def squared_norm(block: Float[Tensor, " batch *shape"]) -> Float[Tensor, " batch"]:
    """The square of each sample's L2 norm; of a sample it is the same in any batch, to the last bit. On a CPU float64.

    >>> squared_norm(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).tolist()
    [25.0, 4.0]
    """
    flat = block[:, None].flatten(1)
    if flat.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dim=1).square()  # a tree of sums
    whole = flat.shape[1] // RUN * RUN
    squares = torch.linalg.vector_norm(flat[:, whole:], dim=1).double().square()
    if whole:
        # no product is stored; of a part that short, several threads do not share out the sum
        norms = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, RUN)), dim=2)
        squares += norms.double().square_().sum(dim=1)
    beyond = ~((squares > _SQUARES[0]) & (squares < _SQUARES[1]))
    if bool(beyond.any()):  # a number's square may be no float32
        squares[beyond] = torch.linalg.vector_norm(flat[beyond], dim=1, dtype=torch.float64).square()
    return squares


def inner_products(
    one: Float[Tensor, "batch entries"], two: Float[Tensor, "others entries"]
) -> Float[Tensor, "batch others"]:
    """`one @ two.mT`.

    >>> inner_products(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([[11.,  2.]])
    """
    whole = one.shape[1] // PART * PART
    rest = one[:, whole:] @ two[:, whole:].mT
    if not whole:
        return rest
    parts, others = (value[:, :whole].unflatten(1, (-1, PART)) for value in (one, two))
    return torch.bmm(parts.transpose(0, 1), others.permute(1, 2, 0)).sum(dim=0) + rest
