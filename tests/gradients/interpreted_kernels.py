"""Runs Triton's kernels in its interpreter, on a CPU, and prints how far they are from the steps they fuse.

A program of its own, since Triton reads TRITON_INTERPRET when it is first imported.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from icons.gradients.fused_fold import FusedFold
from icons.preconditioner import AdamPreconditioner
from icons.projection import CountSketch

SHAPES = [(96, 4), (4, 96), (40, 13), (7,), (1,), (300,), (3, 5, 6)]


def state_of(form: str, shape: torch.Size, seed: int) -> AdamPreconditioner | None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    return None if form == "none" else AdamPreconditioner({"w": first}, {"w": second}, step=7, form=form)


def compare(form: str, shape: torch.Size, dim: int, samples: int) -> float:
    """The largest relative error of a row or a norm, one row being added to what was there."""
    sketch, state = CountSketch(dim, seed=len(shape)), state_of(form, shape, dim)

    def steps(rows: Tensor, norms: Tensor, name: str, block: Tensor) -> None:
        sign = sketch.sign(name, shape, block.device)
        part = block * sign if state is None else state.apply(name, block, sign)
        norms.copy_(part[:, None].flatten(1).norm(dim=1))
        sketch.add(rows, name, part)

    block = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(samples))
    block[-1] *= 1e-6
    before = torch.randn(samples, dim, generator=torch.Generator().manual_seed(1))
    expected, norms = before.clone(), torch.zeros(samples)
    steps(expected, norms, "w", block.clone())
    table = torch.full((samples + 2, 3), -1.0)  # norms lie in a column of a larger table
    found = before.clone()
    FusedFold(sketch, state, steps)._launch(found, table[1 : samples + 1, 1], "w", block)
    assert (table[0] == -1).all() and (table[:, 0] == -1).all() and (table[-1] == -1).all(), "wrote beside its place"
    size = expected.norm(dim=1)
    off = torch.stack([(found - expected).norm(dim=1) / size, (table[1 : samples + 1, 1] - norms).abs() / norms])
    return float(off.max())


def main() -> None:
    errors = {}
    for form in ("none", "diagonal", "adam"):
        for number, shape in enumerate(SHAPES):
            dim, samples = (64, 33, 300, 9)[number % 4], (1, 5, 4)[number % 3]
            errors[f"{form} {shape} {dim} {samples}"] = compare(form, torch.Size(shape), dim, samples)
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
