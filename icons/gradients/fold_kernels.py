"""Triton's kernels for `icons.gradients.fused_fold`, which alone imports them: Triton is there where a GPU is.

Annotations are strings, since Triton looks up what else they name.
"""

from typing import Any

import triton
import triton.language as tl

NONE, DIAGONAL, ADAM = range(3)
SAMPLES, WIDTH, PARTS = 4, 128, 8
"""Of a program: samples, buckets side by side; and how many programs share a bucket's entries."""
_ANY = ["entries", "samples", "length", "rounds", "tiles", "begin", "dim", "parts", "runs"]  # compiled once for all


@triton.jit(do_not_specialize=_ANY)  # type: ignore[untyped-decorator]
def fold(
    block: "Any", sign: "Any", first: "Any", second: "Any", sums: "Any", squares: "Any", share: "Any", eps: "Any",
    entries: "Any", samples: "Any", length: "Any", rounds: "Any", tiles: "Any",
    FORM: tl.constexpr, SAMPLES: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """What a part of a block adds to a tile of buckets, and the sum of its squares."""
    tile, part = tl.program_id(0), tl.program_id(2)
    bucket = tile * WIDTH + tl.arange(0, WIDTH)
    sample = tl.program_id(1) * SAMPLES + tl.arange(0, SAMPLES)
    rows = block + sample.to(tl.int64)[:, None] * entries
    inside = (sample < samples)[:, None]
    total = tl.zeros([SAMPLES, WIDTH], tl.float32)
    square = tl.zeros([SAMPLES, WIDTH], tl.float32)
    for turn in range(part * rounds, (part + 1) * rounds):
        entry = bucket + turn * length
        there = (bucket < length) & (entry < entries)
        value = tl.load(rows + entry[None, :], mask=inside & there[None, :], other=0.0)
        if FORM == 0:
            value = value * tl.load(sign + entry, mask=there, other=0.0)[None, :]
        elif FORM == 1:  # the multiplier has the signs
            value = value * tl.load(first + entry, mask=there, other=0.0)[None, :]
        else:
            signs = tl.load(sign + entry, mask=there, other=0.0)[None, :]
            moment = tl.load(first + entry, mask=there, other=0.0)[None, :]
            size = tl.load(second + entry, mask=there, other=1.0)[None, :]
            value = (value * signs + moment) / (tl.sqrt_rn(size + share * value * value) + eps)
        total += value
        square += value * value
    parts = tl.num_programs(2)
    at = (part * samples + sample).to(tl.int64)[:, None] * length + bucket[None, :]
    tl.store(sums + at, total, mask=inside & (bucket < length)[None, :])
    tl.store(squares + (sample * parts + part) * tiles + tile, tl.sum(square, axis=1), mask=sample < samples)


@triton.jit(do_not_specialize=_ANY)  # type: ignore[untyped-decorator]
def place(
    sums: "Any", squares: "Any", rows: "Any", norms: "Any", row_stride: "Any", norm_stride: "Any",
    length: "Any", begin: "Any", dim: "Any", parts: "Any", runs: "Any",
    WIDTH: tl.constexpr, RUNS: tl.constexpr,
) -> None:  # fmt: skip
    """Adds all parts to the rows, from the parameter's first bucket on, and takes the norms."""
    tile, sample = tl.program_id(0), tl.program_id(1)
    bucket = tile * WIDTH + tl.arange(0, WIDTH)
    inside = bucket < length
    total = tl.zeros([WIDTH], tl.float32)
    for part in range(parts):
        at = (part * tl.num_programs(1) + sample).to(tl.int64) * length + bucket
        total += tl.load(sums + at, mask=inside, other=0.0)
    at = rows + sample.to(tl.int64) * row_stride + (begin + bucket) % dim
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)
    if tile == 0:
        run = tl.arange(0, RUNS)
        each = tl.load(squares + sample * runs + run, mask=run < runs, other=0.0)
        tl.store(norms + sample.to(tl.int64) * norm_stride, tl.sqrt_rn(tl.sum(each, axis=0)))
