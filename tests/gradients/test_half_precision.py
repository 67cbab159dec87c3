"""In half precision a row may be up to twice as far from the float32 gradient as the plain half-precision one is."""

import copy
import warnings
from typing import Any

import pytest
import torch
from small_models import SMALL, assert_rows_close, llama, one_by_one, text_batch, with_lora
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

from icons.gradients import capture, per_sample_gradients
from icons.gradients.capture import SlowerPathWarning
from icons.gradients.proof import prove


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


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.05), (torch.float16, 0.015)])
def test_padding_that_moves_tokens_this_way_and_that_is_found(dtype: torch.dtype, share: float) -> None:
    """The mean of a sample moves by less than the noise of half precision when none of its tokens does."""
    model, batch = with_lora(llama(hidden_size=64, num_hidden_layers=4).to(dtype), ["q_proj"]), text_batch((30, 24), 32)
    per_sample_gradients(model, batch)

    def by_length(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        length = output.shape[1]
        signs = (-1.0) ** torch.arange(length) * (-1) ** length
        return output * (1 + share * signs[:, None]).to(output.dtype)

    model.get_submodule("base_model.model.model.norm").register_forward_hook(by_length)
    with pytest.raises(ValueError, match="a sample's loss depends on its padding"):
        per_sample_gradients(model, batch)


def test_an_overflow_in_float16_is_no_sign_of_a_gradient_that_was_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh adapter's A has no gradient while its B is zero; infinity times zero is none either."""
    model, batch = with_lora(llama(), ["q_proj", "v_proj"]), text_batch()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    head.weight.data *= 5e3
    model.half()
    proofs: list[nn.Module] = []

    def counted(*args: Any) -> Any:
        proofs.append(model)
        return prove(*args)

    monkeypatch.setattr(capture, "prove", counted)
    per_sample_gradients(model, batch)
    found = per_sample_gradients(model, batch)
    expected = one_by_one(copy.deepcopy(model).float(), batch)
    assert len(proofs) == 1
    assert found.isfinite().all()
    assert ((found - expected).norm(dim=1) < 0.05 * expected.norm(dim=1)).all()
