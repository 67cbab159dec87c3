"""What is refused of a model without a pass."""

import pytest
import torch
from small_models import llama, text_batch, with_lora
from torch import Tensor

from icons.gradients import per_sample_gradients


def test_a_model_that_trains_as_soon_as_a_gradient_is_there_is_refused() -> None:
    """Its weights are not moved, before the first batch or after it, and rows are as they were without."""
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    expected = per_sample_gradients(model, batch)
    weight = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default").weight
    assert isinstance(weight, Tensor)
    before = weight.clone()

    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.data.sub_(parameter.grad)

    handle = weight.register_post_accumulate_grad_hook(step)
    with pytest.raises(
        ValueError, match=r"PeftModel runs code of its own .*q_proj.lora_B.default.weight has a post-acc"
    ):
        per_sample_gradients(model, batch)
    assert torch.equal(weight, before)
    handle.remove()
    assert torch.equal(per_sample_gradients(model, batch), expected)
