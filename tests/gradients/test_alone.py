"""A row's gradient is what it is alone, or the model is refused: its loss need not show."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from small_models import SMALL, llama, text_batch, with_lora
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from icons.batch import model_inputs, sample_losses
from icons.gradients import per_sample_gradients
from icons.gradients.alone import LoneRow
from icons.gradients.structure import members_of

pytestmark = pytest.mark.filterwarnings("ignore::icons.gradients.capture.SlowerPathWarning")


class Company(torch.autograd.Function):
    """Nothing forward; a gradient that takes in a part of the others' backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] + ctx.share * gradients[0].mean(dim=0, keepdim=True), None


def sociable(share: float) -> nn.Module:
    """Its losses are a plain model's."""
    model = with_lora(llama(), ["q_proj", "v_proj"])
    norm = model.get_submodule("base_model.model.model.norm")
    norm.register_forward_hook(lambda _module, _args, output: Company.apply(output, share))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [True, False])
def test_a_gradient_that_others_move_is_refused_each_time_where_the_loss_is_not_moved(
    dtype: torch.dtype, masked: bool
) -> None:
    model, batch = sociable(0.5).to(dtype), text_batch()
    if not masked:
        del batch["attention_mask"]
        batch = {name: value[:, :5] if value.ndim > 1 else value for name, value in batch.items()}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a sample's gradient depends on its padding or .* off what it is alone"):
            per_sample_gradients(model, batch)


def test_half_precision_alone_is_no_reason_to_refuse() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = with_lora(LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": 4})), ["q_proj", "v_proj"])
        assert per_sample_gradients(model.bfloat16(), text_batch()).any()


def test_a_first_batch_of_one_row_shows_nothing_of_company() -> None:
    model, batch = sociable(0.5), text_batch()
    one = {name: value[:1] if value.ndim == 1 else value[:1, :12] for name, value in batch.items()}
    assert per_sample_gradients(model, one).any()
    with pytest.raises(ValueError, match="depends on its padding or the samples beside it"):
        per_sample_gradients(model, batch)


def test_a_mask_with_a_hole_is_no_padding() -> None:
    """A row alone keeps its hidden tokens' positions."""
    model, batch = with_lora(llama(), ["q_proj", "v_proj"]), text_batch()
    batch["attention_mask"][1, 2] = 0
    found = per_sample_gradients(model, batch)
    for sample, length in enumerate((12, 5, 9)):
        one = {name: value[sample : sample + 1, :length] for name, value in batch.items() if name != "row"}
        loss = sample_losses(model(**model_inputs(one)).logits, one["labels"]).sum()
        trained = [value for name, value in model.named_parameters() if "lora_" in name]
        expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trained)])
        assert (found[sample] - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("loss", "refused"), [(1e-2, True), (3e-7, False)])
def test_a_small_loss_leaves_float32_little_of_a_gradient_to_compare(loss: float, refused: bool) -> None:
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    lone = LoneRow.of(model, members_of(model), batch, 1)
    assert lone is not None and lone.row == 1
    lone.loss = loss
    receive = lone.begin(lambda _members: lambda _name, _block, _rows: None)(members_of(model))
    for name, gradient in lone.gradients.items():
        receive(name, gradient.expand(3, *gradient.shape) * 1.05, slice(0, 3))
    with pytest.raises(ValueError, match=r"row 1 in its batch is 5.0% off") if refused else nullcontext():
        lone.compare()
