"""Covariances against the slow way: one sample at a time, unpadded, `torch.autograd.grad` of every layer's output."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import alone, image_batch, llama, llava, text_batch, trainable, with_lora
from torch import Tensor, nn

from icons.batch import model_inputs, sample_losses
from icons.gradients import per_sample_gradients
from icons.gradients.covariances import CovarianceSums, covariance_sums, with_drawn_labels

Factors = dict[str, tuple[Tensor, Tensor]]


def remember(name: str, seen: list[tuple[str, Tensor, Tensor]]) -> Callable[..., None]:
    def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((name, given[0], output))

    return hook


def slow_factors(model: nn.Module, batch: dict[str, Tensor], samples: Any = None) -> Factors:
    """Weight -> sums of g g^T and x x^T, float64: over tokens before the last supervised one, over patches that have
    a gradient."""
    layers = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    found: Factors = {}
    for sample in range(len(batch["labels"])) if samples is None else samples:
        seen: list[tuple[str, Tensor, Tensor]] = []
        hooks = [module.register_forward_hook(remember(name, seen)) for name, module in layers.items()]
        single = alone(batch, sample)
        last = int((single["labels"][0] != -100).nonzero().max())
        loss = sample_losses(model(**model_inputs(single), use_cache=False).logits, single["labels"]).sum()
        for hook in hooks:
            hook.remove()
        gradients = torch.autograd.grad(loss, [output for _, _, output in seen], allow_unused=True)
        for (name, x, _), gradient in zip(seen, gradients, strict=True):
            if gradient is None:
                continue
            g, x = gradient.detach().flatten(0, -2).double(), x.detach().flatten(0, -2).double()
            x = x[(g != 0).any(dim=1)] if "vision" in name else x[:last]
            left, right = found.get(name, (torch.zeros(1), torch.zeros(1)))
            found[name] = (left + g.T @ g, right + x.T @ x)
    return found


def assert_same(found: CovarianceSums, expected: Factors, tolerance: float = 1e-5) -> None:
    for name, sides in expected.items():
        for side, true in zip((found.left, found.right), sides, strict=True):
            true = true if side[name].ndim == 2 else true.diagonal()
            assert (side[name] - true).norm() <= tolerance * true.norm(), name


@pytest.mark.parametrize("width", [1024, 32, 0])
def test_sums_are_those_of_samples_one_by_one(width: int) -> None:
    model, batch = with_lora(llama()), text_batch()
    found = covariance_sums(model, batch, width)
    expected = slow_factors(model, batch)
    assert set(found.left) == set(expected) == set(found.square)
    assert_same(found, expected)
    widths = {len(side) for name in expected for side in (found.left[name], found.right[name]) if side.ndim == 1}
    assert widths == {1024: set(), 32: {48}, 0: {3, 32, 48}}[width]
    assert found.rows == 3
    assert found.left_out == 0


def test_squares_are_those_of_the_gradients() -> None:
    model, batch = trainable(llama(), "q_proj layernorm"), text_batch()
    found, rows = covariance_sums(model, batch), per_sample_gradients(model, batch).double()
    shapes = {name: value.numel() for name, value in model.named_parameters() if value.requires_grad}
    for name, part in zip(shapes, rows.split(list(shapes.values()), dim=1), strict=True):
        torch.testing.assert_close(found.square[name], part.square().sum(), rtol=1e-5, atol=0)
        assert int(found.unseen[name]) == (3 if "norm" in name else 0)


def test_whose_images_entries_are_makes_no_difference() -> None:
    """Rows with two images, none, and one: layers of the tower have entries of some rows more than of others."""
    model, batch = with_lora(llava(), r".*(language_model|vision_tower).*(q|v)_proj"), image_batch()
    batch |= {"entries_per_row": {"pixel_values": torch.tensor([2, 0, 1])}}  # type: ignore[dict-item]
    found = covariance_sums(model, batch)
    assert any("vision_tower" in name for name in found.left)
    assert_same(found, slow_factors(model, batch))


def test_neither_padding_nor_batches_nor_their_order_count() -> None:
    model, batch = with_lora(llama()), text_batch((12, 5, 9, 7))
    whole, parts = covariance_sums(model, batch), CovarianceSums()
    for rows in ([3], [2, 0], [1]):
        length = int(batch["attention_mask"][rows].sum(dim=1).max())
        parts.add(covariance_sums(model, {n: v[rows, :length] if v.ndim > 1 else v[rows] for n, v in batch.items()}))
    assert parts.rows == whole.rows == 4
    for kind in ("left", "right", "square"):
        for name, value in getattr(whole, kind).items():
            assert (getattr(parts, kind)[name] - value).norm() <= 1e-5 * value.norm(), (kind, name)


def test_the_same_batch_gives_the_same_bits() -> None:
    model, batch = with_lora(llama()), text_batch()
    one, other = covariance_sums(model, batch).tensors(), covariance_sums(model, batch).tensors()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_row_that_is_not_finite_is_left_out_and_counted() -> None:
    model, batch = with_lora(llama()), text_batch()
    batch["input_ids"][1, 2] = 63
    batch["input_ids"][[0, 2]] = batch["input_ids"][[0, 2]].clamp(max=62)
    model.get_input_embeddings().weight.data[63] = torch.nan  # type: ignore[operator, union-attr, index]
    found = covariance_sums(model, batch)
    assert (found.rows, found.left_out) == (2, 1)
    assert_same(found, slow_factors(model, batch, [0, 2]))
    none = covariance_sums(model, {name: value[1:2] for name, value in batch.items()})
    assert (none.rows, none.left_out) == (0, 1)


def test_float16_gradients_lose_their_scale() -> None:
    model, batch = with_lora(llama()), text_batch()
    expected = slow_factors(model, batch)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.half()
    assert_same(covariance_sums(model, batch), expected, 0.02)


def test_an_empty_batch_adds_nothing() -> None:
    model, batch = with_lora(llama()), text_batch()
    nothing = covariance_sums(model, {name: value[:0] for name, value in batch.items()})
    assert nothing.rows == nothing.left_out == 0
    total = covariance_sums(model, batch)
    before = {name: value.clone() for name, value in total.tensors().items()}
    total.add(nothing)
    assert all(torch.equal(value, before[name]) for name, value in total.tensors().items())


def test_sums_survive_their_tensors() -> None:
    found = covariance_sums(with_lora(llama()), text_batch())
    again = CovarianceSums.of(found.tensors())
    assert (again.rows, again.left_out) == (found.rows, found.left_out)
    assert all(torch.equal(again.right[name], value) for name, value in found.right.items())


def test_labels_are_drawn_from_what_the_model_predicts() -> None:
    """The same row many times under other numbers: frequencies are the softmax, by a chi-squared bound."""
    model, batch, draws = llama().eval(), text_batch((6,), 6), 4000
    model.lm_head.weight.data.mul_(20)  # probabilities that differ
    many = {name: value.expand(draws, *value.shape[1:]) for name, value in batch.items()} | {"row": torch.arange(draws)}
    drawn = with_drawn_labels(model, many)["labels"]
    with torch.no_grad():
        chances = model(**model_inputs(batch)).logits[0, 2:5].double().softmax(dim=1)
    assert torch.equal(drawn[:, :3], many["labels"][:, :3])
    for place, chance in enumerate(chances):
        count = torch.bincount(drawn[:, 3 + place], minlength=64).double()
        assert ((count - draws * chance).square() / (draws * chance)).sum() < 63 + 5 * 126**0.5


def test_drawn_labels_depend_on_the_row_and_the_seed_alone() -> None:
    model, batch = with_lora(llama()), text_batch()
    whole = with_drawn_labels(model, batch, seed=3)["labels"]
    for sample in range(3):
        single = alone(batch, sample) | {"row": batch["row"][sample : sample + 1]}
        one = with_drawn_labels(model, single, seed=3)["labels"][0]
        assert torch.equal(one, whole[sample, : len(one)])
    assert torch.equal(whole == -100, batch["labels"] == -100)
    assert not torch.equal(whole, with_drawn_labels(model, batch, seed=4)["labels"])
    nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}
    assert torch.equal(with_drawn_labels(model, nothing)["labels"], nothing["labels"])
