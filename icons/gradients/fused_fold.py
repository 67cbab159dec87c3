"""On a GPU, all that becomes of a block in one pass over it: preconditioned, signed, folded into rows, its norms taken.

Step by step a block is written and read a dozen times, and a GPU waits for its memory as long as a tenth of a whole
pass. The sums are the same in another order; that they are is checked with the first block of each shape. Where Triton
or a compiler for its launcher is missing, blocks are gone through step by step, and one is told.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from icons.preconditioner import AdamPreconditioner, Preconditioner, UnfusedWarning
from icons.projection import CountSketch, Projector

Steps = Callable[[Tensor, Tensor, str, Tensor], None]
"""Rows [b, K] and norms [b] to put into, a parameter's name and its block [b, *shape]."""
_TOLERANCE = 1e-5  # of a row or a norm: what float32 sums of as many numbers may differ by in another order

_proven: set[tuple[str, str, torch.Size, int]] = set()
_unfused: set[str] = set()  # kinds of device on which it failed


@dataclass(frozen=True)
class FusedFold:
    """One pass over each block.

    Attributes:
        sketch: makes the rows.
        state: of the preconditioner, in the form "adam" or "diagonal"; None leaves gradients plain.
        steps: the same step by step, to be compared with.
    """

    sketch: CountSketch
    state: AdamPreconditioner | None
    steps: Steps

    @classmethod
    def of(
        cls, projector: Projector, preconditioner: Preconditioner | None, device: torch.device, steps: Steps
    ) -> "FusedFold | None":
        """None where blocks are gone through step by step: on a CPU, and with another projector or preconditioner."""
        if device.type != "cuda" or device.type in _unfused or type(projector) is not CountSketch:
            return None
        if preconditioner is None:
            return cls(projector, None, steps)
        if type(preconditioner) is AdamPreconditioner and preconditioner.form in ("adam", "diagonal"):
            return cls(projector, preconditioner, steps)
        return None

    def add(self, rows: Float[Tensor, "b dim"], norms: Float[Tensor, " b"], name: str, block: Tensor) -> None:
        """Adds the projection of a block to `rows`, and writes the norms of what was projected.

        Args:
            rows: float32, the last dimension contiguous.
            norms: float32, of any stride.
            name: of the parameter.
            block: `[b, *shape]` float32, which may be overwritten.

        Warns:
            UnfusedWarning: once, if it fails or gives other sums: from then on blocks are gone through step by step.
        """
        device, form = block.device.type, "none" if self.state is None else self.state.form
        use = (device, form, block.shape[1:], self.sketch.dim)
        if device not in _unfused and (use in _proven or self._prove(name, block)):
            _proven.add(use)
            self._launch(rows, norms, name, block)
        else:
            self.steps(rows, norms, name, block)

    def _prove(self, name: str, block: Tensor) -> bool:
        """Whether both ways give the same sums; of what is not finite or all zero, nothing can be said."""
        found, expected = ([block.new_zeros(len(block), self.sketch.dim), block.new_zeros(len(block))] for _ in "12")
        try:
            self._launch(found[0], found[1], name, block)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an import, a compiler, a driver: whatever it is, there is another way
            self._leave(block.device, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            return False
        self.steps(expected[0], expected[1], name, block.clone())
        norm = expected[1]
        telling = norm.isfinite() & (norm > 1e-18)
        apart = torch.maximum((found[0] - expected[0]).norm(dim=1), (found[1] - norm).abs())[telling] / norm[telling]
        if len(apart) == 0:
            return False
        if not bool((apart <= _TOLERANCE).all()):
            self._leave(block.device, f"its sums for {name} are off by {float(apart.max()):.1g} of a row")
            return False
        return True

    def _leave(self, device: torch.device, reason: str) -> None:
        _unfused.add(device.type)
        warnings.warn(
            f"per-sample gradients: blocks are gone through step by step on {device.type}, which is right and slower: "
            f"the fused kernel does not work here: {reason}",
            UnfusedWarning,
            stacklevel=2,
        )

    def _launch(self, rows: Tensor, norms: Tensor, name: str, block: Tensor) -> None:
        kernels = _kernels()
        shape, flat = block.shape[1:], block[:, None].flatten(1).contiguous()
        samples, entries = flat.shape
        length, begin = self.sketch.fold(name, shape)
        length = min(length, entries)
        sign = self.sketch.sign(name, shape, block.device)
        first = second = sign
        share, eps, form = 0.0, 0.0, kernels.NONE
        if self.state is not None:
            first, *others = self.state.moments(name, sign, block.device)
            form = kernels.ADAM if others else kernels.DIAGONAL
            if others:
                second = others[0]
                share, eps = self.state.scalars(name)
        turns = -(-entries // length)
        parts = min(kernels.PARTS, turns)
        tiles = -(-length // kernels.WIDTH)
        sums, squares = flat.new_empty(parts, samples, length), flat.new_empty(samples, parts * tiles)
        with torch.cuda.device_of(flat):
            kernels.fold[tiles, -(-samples // kernels.SAMPLES), parts](
                flat, sign, first, second, sums, squares, share, eps, entries, samples, length, -(-turns // parts),
                tiles, FORM=form, SAMPLES=kernels.SAMPLES, WIDTH=kernels.WIDTH,
            )  # fmt: skip
            kernels.place[tiles, samples](
                sums, squares, rows, norms, rows.stride(0), norms.stride(0), length, begin, self.sketch.dim, parts,
                parts * tiles, WIDTH=kernels.WIDTH, RUNS=1 << (parts * tiles - 1).bit_length(),
            )  # fmt: skip


@cache
def _kernels() -> Any:
    return import_module("icons.gradients.fold_kernels")
