"""Token losses in chunks against PyTorch's own, values and gradients, and the memory they save."""

import pytest
import torch
from torch.nn import functional as F

import icons.gradients.output_layer
from icons.gradients.output_layer import token_losses


def pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(37, 50, generator=generator)
    return logits.to(dtype).requires_grad_(), torch.randint(0, 50, (37,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 500, 1 << 22])
def test_equal_the_plain_cross_entropy(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icons.gradients.output_layer, "CHUNK", chunk)
    logits, targets = pair(dtype)
    wide = logits.double() if dtype == torch.float64 else logits.float()
    expected = F.cross_entropy(wide, targets, reduction="none")
    weights = torch.linspace(-1, 2, 37, dtype=expected.dtype)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    found = token_losses(logits, targets)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (own,) = torch.autograd.grad((found * weights).sum(), logits)
    assert own.dtype == dtype
    torch.testing.assert_close(own, gradient, rtol=1e-5, atol=1e-6)


def test_a_confident_token_keeps_its_small_loss() -> None:
    logits = torch.zeros(1, 64)
    logits[0, 7] = 12.0
    exact = F.cross_entropy(logits.double(), torch.tensor([7]))
    torch.testing.assert_close(token_losses(logits, torch.tensor([7]))[0].double(), exact, rtol=1e-3, atol=0)


def test_no_token_has_no_loss() -> None:
    logits = torch.zeros(0, 50, requires_grad=True)
    token_losses(logits, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 50)


def test_only_the_logits_as_they_came_are_kept_for_the_backward_pass() -> None:
    logits, targets = pair(torch.bfloat16)
    kept: list[torch.dtype] = []

    def note(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.dtype)
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        token_losses(logits, targets)
    assert kept == [torch.bfloat16, torch.int64]
