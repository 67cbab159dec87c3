"""Seeded random projections P -> K: inner products of gradients survive in a few thousand numbers.

A projection is a function of (seed, parameter name, position in the parameter) alone: the same on every rank, device,
dtype, batch size and block size. Training and validation rows are comparable because of that, and only then.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

DENSE_BLOCK = 1 << 22  # numbers of a dense projection's matrix that exist at once


@runtime_checkable
class Projector(Protocol):
    """A linear map from the parameters' gradients to `dim` numbers, applied parameter by parameter."""

    kind: str
    dim: int
    seed: int

    def start(self, batch: int, layout: Mapping[str, torch.Size], device: torch.device) -> Float[Tensor, "batch dim"]:
        """Zeros to add to, for parameters of these names and shapes."""
        ...

    def sign(self, name: str, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Signs (+1, -1) that the caller multiplies a block by before `add`, or None."""
        ...

    def add(self, total: Float[Tensor, "batch dim"], name: str, block: Float[Tensor, " batch *shape"]) -> None:
        """Adds the projection of one parameter's (signed) per-sample gradients to `total`, in place."""
        ...

    def describe(self) -> dict[str, Any]:
        """This projector's part of the manifest."""
        ...


def stream(seed: int, name: str, part: str) -> np.random.Generator:
    """The random numbers of one parameter: Philox, keyed by a hash, so that they are the same on every machine."""
    key = hashlib.sha256(f"{seed}/{name}/{part}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def _random_signs(generator: np.random.Generator, count: int) -> Float[Tensor, " count"]:
    return torch.from_numpy(generator.integers(0, 2, count, dtype=np.int8)).float().mul_(2).sub_(1)


class Seeded:
    """What all projectors share: kind, dim, seed, and how they are written into the manifest.

    Raises:
        ValueError: dim is below 1.
    """

    kind = ""

    def __init__(self, dim: int, seed: int = 0) -> None:
        if dim < 1:
            raise ValueError(f"{type(self).__name__}: dim {dim}; expected at least 1 (the paper's is 5120)")
        self.dim = dim
        self.seed = seed

    def start(self, batch: int, layout: Mapping[str, torch.Size], device: torch.device) -> Float[Tensor, "batch dim"]:
        return torch.zeros(batch, self.dim, device=device, dtype=torch.float32)

    def sign(self, name: str, shape: torch.Size, device: torch.device) -> Tensor | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "dim": self.dim, "seed": self.seed}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self.dim}, seed={self.seed})"


class CountSketch(Seeded):
    """Each coordinate has a random sign and a bucket; a bucket is the signed sum of its coordinates (default).

    A parameter of shape [O, I], flattened, starts at a random bucket and is folded at the largest odd length up to
    `dim` that is coprime to I: the sum is contiguous memory traffic, and one column, which is where large language
    models have outlier features, spreads over all buckets. Where the fold is longer than O and I, the sign of entry
    (o, i) is s_o t_i, with independent random s and t: two pairs of entries that collide then never share their four
    indices, so that the variance is that of independent signs. Larger parameters have one sign per entry.

    E<Pa, Pb> = <a, b>; the variance is near (|a|^2 |b|^2 + <a, b>^2) / K, that of dense random signs.

    Source: Charikar, Chen, Farach-Colton 2002; Weinberger et al. 2009 (feature hashing).
    """

    kind = "count_sketch"

    def __init__(self, dim: int, seed: int = 0) -> None:
        super().__init__(dim, seed)
        self._signs: dict[tuple[str, torch.Size, torch.device], Tensor] = {}
        self._folds: dict[tuple[str, torch.Size], tuple[int, int]] = {}

    def fold(self, name: str, shape: torch.Size) -> tuple[int, int]:
        """The fold's length and first bucket of one parameter."""
        if (name, shape) not in self._folds:
            begin = int(stream(self.seed, name, "start").integers(self.dim))
            self._folds[name, shape] = self._length(shape), begin
        return self._folds[name, shape]

    def _length(self, shape: torch.Size) -> int:
        """The length at which a flattened parameter of this shape is folded."""
        row = shape[1:].numel() if len(shape) > 1 else 1
        return next((length for length in range(self.dim, 0, -1) if length % 2 and math.gcd(length, row) == 1), 1)

    def sign(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        key = (name, shape, device)
        if key not in self._signs:
            generator = stream(self.seed, name, "sign")
            rows, columns = (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())
            if len(shape) > 1 and self._length(shape) > max(rows, columns):
                sign = _random_signs(generator, rows)[:, None] * _random_signs(generator, columns)
            else:
                sign = _random_signs(generator, shape.numel())
            self._signs[key] = sign.reshape(shape).to(device)
        return self._signs[key]

    def add(self, total: Float[Tensor, "batch dim"], name: str, block: Float[Tensor, " batch *shape"]) -> None:
        length, begin = self.fold(name, block.shape[1:])
        flat = block[:, None].flatten(1)
        whole = flat.shape[1] // length * length
        folded = flat[:, :whole].unflatten(1, (-1, length)).sum(dim=1) if whole else flat
        if 0 < whole < flat.shape[1]:
            rest = flat[:, whole:]
            folded[:, : rest.shape[1]].add_(rest)
        first = self.dim - begin  # up to the last bucket, then on from the first
        head = folded[:, :first]
        total[:, begin : begin + head.shape[1]].add_(head)
        if first < folded.shape[1]:
            total[:, : folded.shape[1] - first].add_(folded[:, first:])


class Dense(Seeded):
    """A dense random matrix, made block by block from its seed; never more than 4 M numbers of it exist at once."""

    def entries(self, generator: np.random.Generator, count: int) -> Tensor:
        raise NotImplementedError

    def add(self, total: Float[Tensor, "batch dim"], name: str, block: Float[Tensor, " batch *shape"]) -> None:
        flat, height = block[:, None].flatten(1), max(1, DENSE_BLOCK // self.dim)
        for number, begin in enumerate(range(0, flat.shape[1], height)):
            part = flat[:, begin : begin + height]
            matrix = self.entries(stream(self.seed, name, f"block {number}"), part.shape[1] * self.dim)
            matrix = matrix.reshape(part.shape[1], self.dim).to(total.device)
            total.addmm_(part, matrix, alpha=1 / math.sqrt(self.dim))


class Rademacher(Dense):
    """Dense random signs / sqrt(K), as the original's TRAK projector; variance (|a|^2 |b|^2 + <a, b>^2 - ...) / K."""

    kind = "rademacher"

    def entries(self, generator: np.random.Generator, count: int) -> Tensor:
        return _random_signs(generator, count)


class Gaussian(Dense):
    """Dense standard normal numbers / sqrt(K) (Johnson and Lindenstrauss 1984)."""

    kind = "gaussian"

    def entries(self, generator: np.random.Generator, count: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal(count, dtype=np.float32))


class Identity:
    """No projection: row entries are the P gradient entries, in `named_parameters()` order. For small models."""

    kind = "identity"
    seed = 0

    def __init__(self) -> None:
        self.dim = 0  # known once the parameters are
        self.begin: dict[str, int] = {}

    def start(self, batch: int, layout: Mapping[str, torch.Size], device: torch.device) -> Float[Tensor, "batch dim"]:
        self.begin, self.dim = {}, 0
        for name, shape in layout.items():
            self.begin[name] = self.dim
            self.dim += shape.numel()
        return torch.zeros(batch, self.dim, device=device, dtype=torch.float32)

    def sign(self, name: str, shape: torch.Size, device: torch.device) -> Tensor | None:
        return None

    def add(self, total: Float[Tensor, "batch dim"], name: str, block: Float[Tensor, " batch *shape"]) -> None:
        flat = block[:, None].flatten(1)
        total[:, self.begin[name] : self.begin[name] + flat.shape[1]].add_(flat)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "dim": self.dim, "seed": self.seed}


class ConcatProjector:
    """Several projections in one backward pass, side by side in one row; `split` takes them apart.

    Args:
        projectors: for example count sketches of several dimensions.
    """

    kind = "several"
    seed = 0

    def __init__(self, projectors: Sequence[Projector]) -> None:
        self.projectors = list(projectors)
        self.dim = sum(projector.dim for projector in projectors)

    def start(self, batch: int, layout: Mapping[str, torch.Size], device: torch.device) -> Float[Tensor, "batch dim"]:
        parts = [projector.start(batch, layout, device) for projector in self.projectors]
        self.dim = sum(projector.dim for projector in self.projectors)
        return torch.cat(parts, dim=1)

    def sign(self, name: str, shape: torch.Size, device: torch.device) -> Tensor | None:
        return None  # each has its own

    def add(self, total: Float[Tensor, "batch dim"], name: str, block: Float[Tensor, " batch *shape"]) -> None:
        for projector, part in zip(self.projectors, self.split(total), strict=True):
            sign = projector.sign(name, block.shape[1:], block.device)
            projector.add(part, name, block if sign is None else block * sign)

    def split(self, rows: Float[Tensor, "batch dim"]) -> list[Float[Tensor, "batch _"]]:
        """Each projector's part of the rows, as views."""
        return list(rows.split([projector.dim for projector in self.projectors], dim=1))

    def describe(self) -> dict[str, Any]:
        parts = [projector.describe() for projector in self.projectors]
        return {"kind": self.kind, "dim": self.dim, "seed": self.seed, "parts": parts}


PROJECTORS: dict[str, Callable[..., Projector]] = {
    "count_sketch": CountSketch,
    "rademacher": Rademacher,
    "gaussian": Gaussian,
}
