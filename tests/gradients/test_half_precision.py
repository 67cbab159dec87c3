"""In half precision a row may be up to twice as far from the float32 gradient as the plain half-precision one is."""

import copy
import warnings
from typing import Any

import pytest
import torch
from small_models import SMALL, assert_rows_close, llama, one_by_one, text_batch
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

from icons.gradients import per_sample_gradients
from icons.gradients.capture import SlowerPathWarning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_small_parameter_that_is_read_elsewhere_is_found_in_any_precision(dtype: torch.dtype) -> None:
    """BERT's output bias belongs to a module around the layer that adds it: its own module is never called."""
    torch.manual_seed(0)
    model, batch = BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)).eval().to(dtype), text_batch()
    expected, plain = one_by_one(copy.deepcopy(model).float(), batch), one_by_one(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowerPathWarning)
        found = per_sample_gradients(model, batch)
    allowed = 2 * (plain - expected).norm(dim=1) + 1e-4 * expected.norm(dim=1)
    assert ((found - expected).norm(dim=1) <= allowed).all()


class Masked(nn.Module):
    """Hides padding by a mask of the whole batch, which it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(32))
        self.mask = torch.ones(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain * self.mask[..., None]


def test_a_module_that_does_not_run_on_one_sample_takes_the_slower_path() -> None:
    model, batch, masked = llama(), text_batch(), Masked()
    body: Any = model.model
    body.norm = nn.Sequential(body.norm, masked)
    body.embed_tokens.register_forward_pre_hook(lambda _, args: setattr(masked, "mask", (args[0] != 0).float()))
    for name, parameter in model.eval().named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.warns(SlowerPathWarning, match=r"1 trainable parameters \(model.norm.1.gain"):
        found = per_sample_gradients(model, batch)
    assert_rows_close(found, one_by_one(model, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found, per_sample_gradients(model, batch))
