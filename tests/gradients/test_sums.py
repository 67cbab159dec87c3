"""Long sums are right to float32's last digits, and the same in any batch."""

from typing import Any

import pytest
import torch
from small_models import llama, text_batch, trainable
from torch import Tensor

from icons.gradients import projected_gradients, sums
from icons.gradients.sums import PART, SquaredNorms, inner_products, samples_at_a_time, squared_norm
from icons.preconditioner import AdamPreconditioner, Sign
from icons.projection import CountSketch


@pytest.mark.parametrize("entries", [1, 7, 100, PART - 1, PART, 2 * PART + 5, 700_001])
def test_squared_norms_are_float64s_and_the_same_in_any_batch(entries: int) -> None:
    block = torch.randn(5, entries, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-6], [1], [3], [0], [1e-25]]
    )
    found, expected = squared_norm(block), block.double().square().sum(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=0)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for rows in (slice(0, 1), slice(1, 3), slice(2, 5), slice(0, 5)):
            assert torch.equal(squared_norm(block[rows]), found[rows])


@pytest.mark.parametrize("entries", [1, 100, PART, 2 * PART + 5, 700_001])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_inner_products_are_float64s(entries: int, samples: int) -> None:
    """Of vectors that are alike, whose sums are long and one-sided: 700,000 products one by one are 1e-5 off."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(samples, entries, generator=generator)
    two = one[:1] + torch.randn(3, entries, generator=generator)
    size = one.double().norm(dim=1)[:, None] * two.double().norm(dim=1)
    error = (inner_products(one, two).double() - one.double() @ two.double().mT).abs() / size
    assert error.max() < 1e-6


def test_norms_are_right_wherever_float32_holds_them() -> None:
    """Their squares are none: of a sample that a model knows by heart, or whose loss is enormous."""
    sizes = torch.logspace(-40, 36, 77, dtype=torch.float64)
    block = (sizes[:, None] * torch.randn(1, 1500, generator=torch.Generator().manual_seed(0))).float()
    norms = SquaredNorms(len(block), ["weight", "other"], torch.device("cpu"))
    norms.put("weight", block, slice(0, 77))
    norms.put("other", torch.stack([block[:, 0]] * 3, dim=1), slice(0, 77))
    expected = torch.cat([block, torch.stack([block[:, 0]] * 3, dim=1)], dim=1).double().norm(dim=1)
    assert norms.norm().dtype == torch.float32
    torch.testing.assert_close(norms.norm().double(), expected, rtol=3e-7, atol=2.0**-149)
    bad = squared_norm(torch.tensor([[1.0, torch.nan], [torch.inf, 0.0], [3.0, 4.0]]))
    assert bad[0].isnan() and bad[1].isinf() and bad[2] == 25


def test_of_no_samples_and_of_a_number_without_dimensions() -> None:
    assert squared_norm(torch.zeros(0, 3, 4)).shape == (0,)
    assert squared_norm(torch.tensor([2.0, 3.0])).tolist() == [4.0, 9.0]
    assert inner_products(torch.zeros(0, 3), torch.zeros(2, 3)).shape == (0, 2)


def test_large_blocks_are_gone_through_in_pieces_of_a_cache() -> None:
    cpu = torch.device("cpu")
    assert samples_at_a_time(5, 1 << 19, cpu) == [slice(row, row + 1) for row in range(5)]
    assert samples_at_a_time(33, 1 << 16, cpu)[-2:] == [slice(28, 32), slice(32, 33)]
    assert samples_at_a_time(2, 3, cpu) == [slice(0, 2)] and samples_at_a_time(0, 3, cpu) == [slice(0, 0)]


@pytest.mark.parametrize("form", ["none", "adam", "diagonal", "sign"])
def test_blocks_in_pieces_give_the_same_bits(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a weight that is used twice, too."""
    model, batch = trainable(llama(), "q_proj mlp norm"), text_batch((12, 5, 9, 7, 11))
    layers: Any = model.model.layers  # type: ignore[union-attr]
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    generator = torch.Generator().manual_seed(3)
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    first, second = ({n: torch.rand(v.shape, generator=generator) for n, v in named.items()} for _ in range(2))
    state = None if form == "none" else Sign() if form == "sign" else AdamPreconditioner(first, second, 10, form=form)
    whole = projected_gradients(model, batch, CountSketch(97), state)
    monkeypatch.setattr(sums, "LARGE", 0)
    for cached in (1, 2500):  # one sample at a time; some
        monkeypatch.setattr(sums, "CACHED", cached)
        pieces = projected_gradients(model, batch, CountSketch(97), state)
        assert torch.equal(pieces.gradient, whole.gradient) and torch.equal(pieces.norm, whole.norm)


class Centred(AdamPreconditioner):
    """Of a user: asks for whole blocks."""

    def apply(self, name: str, gradient: Tensor, sign: Tensor | None = None) -> Tensor:
        return super().apply(name, gradient - gradient.mean(dim=0), sign)


def test_what_is_derived_from_a_preconditioner_gets_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = trainable(llama(), "q_proj"), text_batch()
    moments = {name: torch.ones_like(value) for name, value in model.named_parameters() if value.requires_grad}
    state = Centred(moments, moments, 10)
    whole = projected_gradients(model, batch, CountSketch(97), state)
    monkeypatch.setattr(sums, "LARGE", 0)
    monkeypatch.setattr(sums, "CACHED", 1)
    assert torch.equal(projected_gradients(model, batch, CountSketch(97), state).gradient, whole.gradient)
