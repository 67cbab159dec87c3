"""Rows are float32 sums whatever the weights, autocast or torch's default dtype are, and float16 loses none of them."""

import copy
import math
from typing import Any

import pytest
import torch
from small_models import llama, one_by_one, text_batch, with_lora
from torch import nn

from icons.gradients import TaskMatrix, per_sample_gradients, projected_gradients, scored_gradients, weighted_gradient
from icons.preconditioner import Sign
from icons.projection import CountSketch


def fitted(loss: float) -> nn.Module:
    """A float16 model whose output layer is solved for: each token of the batch has this loss."""
    model, batch = with_lora(llama(), ["q_proj", "v_proj"]), text_batch()
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    sample, position = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    with torch.no_grad():
        base: Any = model.get_base_model()  # type: ignore[operator]
        hidden = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        targets = nn.functional.one_hot(batch["labels"][:, 1:][sample, position], 64).double()
        logit = math.log(63 / math.expm1(loss))  # against 63 zeros
        head.weight = nn.Parameter((hidden[sample, position].double().pinverse() @ targets * logit).float().T)
    return model.half()


@pytest.mark.parametrize("loss", [1e-2, 1e-3, 1e-4])
def test_small_losses_keep_their_gradients_in_float16(loss: float) -> None:
    """Against float32 arithmetic on the same weights; what is left is float16's rounding of activations."""
    model, batch = fitted(loss), text_batch()
    expected = one_by_one(copy.deepcopy(model).float(), batch)
    found = per_sample_gradients(model, batch)
    assert found.dtype == torch.float32
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 0.05, error
    assert ((found == 0) & (expected != 0)).float().mean() < 0.01


def test_a_sample_that_overflows_in_float16_is_tried_with_less() -> None:
    model, batch = with_lora(llama(), ["q_proj", "v_proj"]), text_batch()
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    head.weight.data *= 5e3
    model.half()
    expected = one_by_one(copy.deepcopy(model).float(), batch)
    found = per_sample_gradients(model, batch)
    assert found.isfinite().all()
    assert ((found - expected).norm(dim=1) < 0.05 * expected.norm(dim=1)).all()


def test_task_vectors_of_a_float16_model_keep_small_gradients() -> None:
    model, batch = fitted(1e-4), text_batch()
    rows = one_by_one(copy.deepcopy(model).float(), batch)
    weights = 1 / rows.norm(dim=1)
    found = torch.cat([value.flatten() for value in weighted_gradient(model, batch, weights).values()])
    assert torch.cosine_similarity(found, weights @ rows, dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_accumulators_are_float32_under_any_default(dtype: torch.dtype, way: str) -> None:
    """`--trainer.precision 16-true` and `bf16-true` change torch's default dtype, `*-mixed` autocasts."""
    model, batch = with_lora(llama(), ["q_proj", "v_proj"]), text_batch()
    expected = one_by_one(model, batch)
    vectors = [{name: torch.ones_like(value) for name, value in model.named_parameters() if value.requires_grad}]
    usual = torch.get_default_dtype()
    try:
        if way == "weights":
            model.to(dtype)
            torch.set_default_dtype(dtype)
        with torch.autocast("cpu", dtype=dtype, enabled=way == "autocast"):
            rows = per_sample_gradients(model, batch)
            found = projected_gradients(model, batch, CountSketch(64))
            signs = projected_gradients(model, batch, CountSketch(64), Sign())
            product, norm, _ = scored_gradients(model, batch, TaskMatrix(model, vectors))
    finally:
        torch.set_default_dtype(usual)
    given = (rows, found.gradient, found.norm, found.loss, signs.gradient, product, norm)
    assert {value.dtype for value in given} == {torch.float32}
    torch.testing.assert_close(found.norm, expected.norm(dim=1), rtol=0.02, atol=0)
    torch.testing.assert_close(norm, found.norm, rtol=1e-5, atol=0)
    assert ((rows - expected).norm(dim=1) < 0.05 * expected.norm(dim=1)).all()
