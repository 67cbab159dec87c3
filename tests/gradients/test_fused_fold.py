"""The fused kernel gives what its steps give; where it fails, or gives something else, the steps are taken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from icons.gradients import fused_fold
from icons.gradients.fused_fold import FusedFold
from icons.gradients.projected_rows import ProjectedRows
from icons.preconditioner import AdamPreconditioner, Sign, UnfusedWarning
from icons.projection import CountSketch, Gaussian

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = {"w": torch.Size([6, 5]), "b": torch.Size([4])}


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_fold, "_proven", set())
    monkeypatch.setattr(fused_fold, "_unfused", set())


def adam(form: str = "adam") -> AdamPreconditioner:
    return AdamPreconditioner({"w": torch.zeros(2)}, {"w": torch.ones(2)}, step=3, form=form)


def test_in_the_interpreter_it_gives_what_its_steps_give() -> None:
    pytest.importorskip("triton", reason="Triton is made for Linux alone")
    program = Path(__file__).with_name("interpreted_kernels.py")
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout)
    assert len(errors) == 21
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def test_it_is_for_count_sketches_on_a_gpu_with_moments_or_without() -> None:
    def chosen(*given: Any) -> bool:
        return FusedFold.of(*given, lambda *_: None) is not None

    assert chosen(CountSketch(8), None, CUDA) and chosen(CountSketch(8), adam(), CUDA)
    assert chosen(CountSketch(8), adam("diagonal"), CUDA)
    assert not chosen(CountSketch(8), None, CPU)
    assert not chosen(CountSketch(8), adam("sign"), CUDA) and not chosen(CountSketch(8), Sign(), CUDA)
    assert not chosen(Gaussian(8), None, CUDA)


def rows_by(launch: Any, monkeypatch: pytest.MonkeyPatch, blocks: int = 2) -> tuple[ProjectedRows, ProjectedRows]:
    """Rows by a fused pass whose kernel is `launch`, and by its steps."""
    monkeypatch.setattr(FusedFold, "_launch", launch)
    fused, stepped = (ProjectedRows(3, SHAPES, CPU, CountSketch(7), None) for _ in range(2))
    fused.fused = FusedFold(CountSketch(7), None, fused._add)
    fused._squares._numbers = torch.zeros(3, 2)  # a GPU holds norms, in float32
    for number in range(blocks):
        for name, shape in SHAPES.items():
            block = torch.randn(3, *shape, generator=torch.Generator().manual_seed(number))
            for rows in (fused, stepped):
                rows.receive(name, block.clone(), slice(0, 3))
    return fused, stepped


def right(self: FusedFold, rows: Tensor, norms: Tensor, name: str, block: Tensor) -> None:
    self.steps(rows, norms, name, block.clone())


def test_what_agrees_with_the_steps_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def launch(self: FusedFold, rows: Tensor, norms: Tensor, name: str, block: Tensor) -> None:
        calls.append(name)
        right(self, rows, norms, name, block)

    fused, stepped = rows_by(launch, monkeypatch)
    assert torch.equal(fused.total, stepped.total)
    assert calls == ["w", "w", "b", "b", "w", "b"]  # each shape is proven once


def test_what_fails_is_left_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: Any) -> None:
        raise RuntimeError("no C compiler\nin the path")

    with pytest.warns(UnfusedWarning, match=r"step by step on cpu, .*: RuntimeError: no C compiler$") as told:
        fused, stepped = rows_by(launch, monkeypatch)
    assert len(told) == 1 and torch.equal(fused.total, stepped.total)


def test_other_sums_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(self: FusedFold, rows: Tensor, norms: Tensor, name: str, block: Tensor) -> None:
        right(self, rows, norms, name, block)
        rows[1, 2] += 1e-3 * norms[1]

    with pytest.warns(UnfusedWarning, match="its sums for w are off by 0.001 of a row"):
        fused, stepped = rows_by(launch, monkeypatch)
    assert torch.equal(fused.total, stepped.total)


def test_memory_that_runs_out_is_no_reason_to_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: Any) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        rows_by(launch, monkeypatch)


def test_zeros_and_what_is_not_finite_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def launch(self: FusedFold, rows: Tensor, norms: Tensor, name: str, block: Tensor) -> None:
        calls.append(name)
        right(self, rows, norms, name, block)

    rows_by(launch, monkeypatch, blocks=0)
    rows = ProjectedRows(2, SHAPES, CPU, CountSketch(7), None)
    fold, norms = FusedFold(CountSketch(7), None, rows._add), torch.zeros(2)
    for block in (torch.zeros(2, 6, 5), torch.full((2, 6, 5), torch.nan), torch.ones(2, 6, 5)):
        fold.add(torch.zeros(2, 7), norms, "w", block)
    assert len(calls) == 1 + 1 + 2
