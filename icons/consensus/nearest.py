"""The training rows with the highest products with each validation row."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from icons.consensus.pairs import Pairs


def nearest(
    pairs: Pairs, free: Bool[np.ndarray, " rows"], ties: Float[np.ndarray, " rows"], length: int
) -> list[Int[np.ndarray, " nearest"]]:
    """For each validation row, the free training rows with the highest products, best first: up to `length` of them.

    Equal products are ordered by `ties`, then by row. Where the last of a list may be level with rows that found no
    room in it, those level with it are left out, unless all are.
    """
    lists, values = nearest_with_products(pairs, free, length)
    nearest_rows = []
    for rows, products in zip(lists, values, strict=True):
        order = np.lexsort((rows, -ties[rows], -products))
        kept = int((products > products[order[-1]]).sum()) if len(rows) == length else len(rows)
        nearest_rows.append(rows[order][: kept or len(rows)])
    return nearest_rows


def nearest_with_products(
    pairs: Pairs, free: Bool[np.ndarray, " rows"], length: int
) -> tuple[list[Int[np.ndarray, " nearest"]], list[Float[np.ndarray, " nearest"]]]:
    """Rows and products, highest first; equal products in any order. One look at all products."""
    best = torch.empty(pairs.width, 0)
    rows = torch.empty(pairs.width, 0, dtype=torch.int32)
    for part, block in pairs.blocks():
        here = np.flatnonzero(free[part])
        if not len(here):
            continue
        products = block[torch.from_numpy(here)].T
        numbers = torch.from_numpy(here + part.start).int().expand(pairs.width, -1)
        both, which = torch.cat([best, products], dim=1).topk(min(length, best.shape[1] + len(here)), dim=1)
        best, rows = both, torch.cat([rows, numbers], dim=1).gather(1, which)
    return [*rows.numpy().astype(np.int64)], [*best.numpy()]
