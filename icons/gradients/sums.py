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
        self._parts = torch.zeros(size, len(names), device=device, dtype=torch.float32)

    def put(self, name: str, block: Float[Tensor, "rows *shape"], rows: slice) -> None:
        """Of one parameter and some samples; what was put there before is forgotten."""
        parts = self._parts[rows, self._column[name]]
        if parts.device.type == "cpu":
            parts.copy_(squared_norm(block))
        else:
            torch.linalg.vector_norm(block[:, None].flatten(1), dim=1, out=parts)

    def sum(self) -> Float[Tensor, " batch"]:
        parts = self._parts if self._parts.device.type == "cpu" else self._parts.square()
        return parts.sum(dim=1)


def squared_norm(block: Float[Tensor, "batch *shape"]) -> Float[Tensor, " batch"]:
    """The square of each sample's L2 norm; of a sample it is the same in any batch, to the last bit.

    >>> squared_norm(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([25.,  4.])
    """
    flat = block[:, None].flatten(1)
    if flat.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dim=1).square()  # a tree of sums
    whole = flat.shape[1] // RUN * RUN
    rest = torch.linalg.vector_norm(flat[:, whole:], dim=1).square()
    if not whole:
        return rest
    # no product is stored; of a part that short, several threads do not share out the sum
    norms = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, RUN)), dim=2)
    return norms.square_().sum(dim=1).add_(rest)


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
