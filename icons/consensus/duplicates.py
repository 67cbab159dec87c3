"""Near-duplicates inside a selection, by the cosine of their gradients: of each pair the better row stays."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from icons.scores.rows import Source, as_rows, blocks, ranges

_SKETCH_DIM = 512
_BLOCK_ROWS, _KEPT_ROWS = 512, 1 << 15
_ROUNDING = 1e-5
_MARGIN = 5
"""Standard errors by which a sketched cosine may be too low."""


class NearDuplicates:
    """Takes rows from best to worst and tells which are near-duplicates of a better one that stayed.

    The first numbers of a random projection are a smaller random projection: pairs are found by the first 512 of K and
    confirmed by all of them. Normalised rows lie in a temporary file, 2 K bytes each; in memory are 2 KB a row.

    Args:
        source: gradients of the training rows.
        cosine: at and above which two rows are near-duplicates.
        device: where the products are computed.

    Raises:
        ValueError: a cosine that is not above 0 and at most 1.

    >>> rows = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]], dtype=np.float32)
    >>> with NearDuplicates(rows, 0.9) as near:
    ...     near.add([2, 1, 0]).tolist()
    [False, False, True]
    """

    def __init__(self, source: Source, cosine: float, device: str | torch.device = "cpu") -> None:
        if not 0 < cosine <= 1:
            raise ValueError(f"near-duplicates: got cosine {cosine}; expected above 0 and at most 1")
        self.source, self.cosine, self.device = as_rows(source), cosine, torch.device(device)
        self.dim = int(self.source.gradients.shape[1])
        width = min(_SKETCH_DIM, self.dim)
        self.reach = cosine - (_MARGIN * (1 - cosine**2) / width**0.5 if width < self.dim else 0) - _ROUNDING
        self.sketches = torch.empty(0, width)
        self.kept: list[np.ndarray] = []
        self.folder = tempfile.TemporaryDirectory(prefix="icons-duplicates-")
        self.num_files = 0

    def __enter__(self) -> "NearDuplicates":
        return self

    def __exit__(self, *error: object) -> None:
        self.kept = []
        self.folder.cleanup()

    def add(self, rows: Sequence[int] | Int[np.ndarray, " rows"], keep: int = 0) -> Bool[np.ndarray, " rows"]:
        """Which of the rows are near-duplicates of a better one, among these or those added before.

        Args:
            rows: from best to worst, all worse than those added before.
            keep: so many of the first rows stay in any case.
        """
        order = np.asarray(rows, dtype=np.int64)
        whole = self.load(order)
        dropped = np.zeros(len(order), bool)
        for start in range(0, len(order), _BLOCK_ROWS):
            block = np.arange(start, min(start + _BLOCK_ROWS, len(order)))
            sketch = self.sketch(whole[block])
            stayed: list[int] = []
            near = self.neighbours(sketch)
            inside = (sketch @ sketch.T >= self.reach).cpu().numpy()
            for index, row in enumerate(block.tolist()):
                better = [whole[block[other]] for other in stayed if inside[index, other]]
                better += [self.kept[other] for other in near.get(index, [])]
                if row >= keep and any(self.is_near(whole[row], other) for other in better):
                    dropped[row] = True
                else:
                    stayed.append(index)
            self.sketches = torch.cat([self.sketches, sketch[stayed].cpu()])
            self.kept += [whole[block[index]] for index in stayed]
        return dropped

    def neighbours(self, sketch: Float[Tensor, "block width"]) -> dict[int, list[int]]:
        """Place in the block -> kept rows that may be near."""
        near: dict[int, list[int]] = {}
        for start in range(0, len(self.sketches), _KEPT_ROWS):
            kept = self.sketches[start : start + _KEPT_ROWS].to(self.device)
            for index, other in (sketch @ kept.T >= self.reach).nonzero().tolist():
                near.setdefault(index, []).append(start + other)
        return near

    def is_near(self, row: Float[np.ndarray, " dim"], other: Float[np.ndarray, " dim"]) -> bool:
        one, two = row.astype(np.float32), other.astype(np.float32)
        lengths = np.linalg.norm(one) * np.linalg.norm(two)
        return bool(one @ two >= (self.cosine - _ROUNDING) * lengths)

    def sketch(self, rows: Float[np.ndarray, "block dim"]) -> Float[Tensor, "block width"]:
        part = torch.from_numpy(rows[:, : self.sketches.shape[1]].astype(np.float32)).to(self.device)
        return torch.nn.functional.normalize(part, dim=1)

    def load(self, order: Int[np.ndarray, " rows"]) -> Float[np.ndarray, "rows dim"]:
        """The rows, normalised, in the given order, as a file: read from the store chunk by chunk."""
        if len(order) == 0:
            return np.empty((0, self.dim), np.float16)
        self.num_files += 1
        path = Path(self.folder.name) / f"{self.num_files}.npy"
        whole = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(len(order), self.dim))
        by_row = np.argsort(order, kind="stable")
        chunk = self.source.partition.chunk_rows
        wanted = np.unique(order // chunk)
        units = (self.source.partition.unit_rows(unit) for unit in wanted.tolist())
        pieces = [piece for unit in units for piece in ranges(unit, self.source)]
        for block in blocks(self.source, pieces, self.device):
            first, last = np.searchsorted(order[by_row], [block.rows.start, block.rows.stop])
            places = by_row[first:last]
            unit = torch.nn.functional.normalize(block.gradient[order[places] - block.rows.start], dim=1)
            whole[places] = unit.half().cpu().numpy()
        return whole
