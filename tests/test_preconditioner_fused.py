"""The fused step against the unfused one, how often it is compiled, and what happens without a compiler."""

import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

import icons.preconditioner
from icons.preconditioner import AdamPreconditioner, UnfusedWarning


def both(shape: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    first, second = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    gradient = torch.randn(batch, *shape, generator=generator)
    sign = torch.randn(shape, generator=generator).sign()
    found = [
        AdamPreconditioner({"w": 1e-2 * first}, {"w": second}, 7, compiled=compiled).apply("w", gradient.clone(), sign)
        for compiled in (True, False)
    ]
    return found[0], found[1]


def test_without_a_compiler_it_runs_unfused_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no C++ compiler found\nand more")

    monkeypatch.setattr(icons.preconditioner, "compiled", broken)
    monkeypatch.setattr(icons.preconditioner, "UNCOMPILED", set())
    with pytest.warns(UnfusedWarning, match=r"runs unfused on cpu: no C\+\+ compiler found$"):
        torch.testing.assert_close(*both((4, 6), 3), rtol=1e-6, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(*both((4, 6), 3), rtol=1e-6, atol=1e-6)


COUNTED = """
import torch
from torch._dynamo.utils import counters
from icons.preconditioner import UNCOMPILED, fused_step, step

for shape, batch in (((8, 32), 4), ((32, 8), 7), ((16, 40), 3), ((50,), 5), ((8, 32), 9)):
    first, second, gradient = torch.randn(shape), torch.rand(shape), torch.randn(batch, *shape)
    given = (gradient, first.sign(), first, second, 0.1, 1e-7)
    torch.testing.assert_close(fused_step(*given), step(*given), rtol=1e-6, atol=1e-6)
print(counters["stats"]["unique_graphs"], UNCOMPILED)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_the_fused_step_is_the_same_and_is_not_compiled_for_every_shape() -> None:
    """In a process of its own: the type checks of the tests are no code that can be compiled."""
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True)
    assert done.stdout == "2 set()\n"  # weights, and biases, which are no views
