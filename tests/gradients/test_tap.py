"""Taps keep the narrow input where an adapter widened it, and only there; gradients do not change by a bit."""

import gc
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from icons.gradients import per_sample_gradients
from icons.gradients.backward_pass import BackwardPass
from icons.gradients.paths import KNOWN
from icons.gradients.tap import NarrowInputs, Tap

pytestmark = pytest.mark.filterwarnings("ignore")


def half_model() -> nn.Module:
    """bfloat16 weights with a float32 adapter, as a model is loaded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config).bfloat16(), LoraConfig(r=3, target_modules="all-linear")).eval()
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    return model


def text(size: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (size, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "row": torch.arange(size)}


def kept_inputs(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    kept: list[Tensor] = []
    plain = Tap.apply

    def apply(output: Tensor, see: Any, *x: Tensor) -> Tensor:
        kept.extend(x)
        return plain(output, see, *x)  # type: ignore[no-untyped-call,no-any-return]

    monkeypatch.setattr(Tap, "apply", apply)
    per_sample_gradients(model, text())
    return kept


def test_the_inputs_of_an_adapter_are_kept_as_the_layer_got_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_model()
    per_sample_gradients(model, text())
    kept = kept_inputs(model, monkeypatch)
    wide = [value for value in kept if value.dtype == torch.float32]
    assert {value.shape[-1] for value in wide} == {3}  # lora_B gets what lora_A made in float32
    narrow = [value for value in kept if value.dtype == torch.bfloat16]
    assert len(narrow) == 2 * 7
    assert len({value.data_ptr() for value in narrow}) == 2 * 4  # q, k and v share one; gate and up share one


def test_nothing_of_a_pass_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[weakref.ref[BackwardPass]] = []
    begun = BackwardPass.__init__

    def remembered(self: BackwardPass, *args: Any, **options: Any) -> None:
        begun(self, *args, **options)
        passes.append(weakref.ref(self))

    monkeypatch.setattr(BackwardPass, "__init__", remembered)
    model = half_model()
    for _ in range(2):
        per_sample_gradients(model, text())
    gc.collect()
    assert [one() for one in passes] == [None] * 2  # the first is its own proof


def test_the_rows_are_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = per_sample_gradients(half_model(), text())
    monkeypatch.setattr(NarrowInputs, "of", lambda self, module, x: x)
    assert torch.equal(found, per_sample_gradients(half_model(), text()))


class Scaled(nn.Module):
    """Gives its inner layer something else than a widened copy of its own input, from the second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.factors = nn.Linear(4, 2), [1.0, 2.0]

    def forward(self, x: Tensor) -> Tensor:
        return sum((self.inner(x.float() * factor) for factor in self.factors), torch.zeros(()))


def test_a_layer_that_once_got_something_else_keeps_its_own_input() -> None:
    module, seen = nn.Sequential(Scaled()), []
    inputs = NarrowInputs({module[0].inner: ("0.inner", module[0])}, {})
    inputs.checking = True
    inputs.hooks()
    module[0].inner.register_forward_hook(lambda layer, args, _: seen.append(inputs.of(layer, args[0])))
    module(torch.ones(3, 4, dtype=torch.bfloat16))
    module[0].factors = [1.0]
    module(torch.ones(3, 4, dtype=torch.bfloat16))
    assert [value.dtype for value in seen] == [torch.bfloat16, torch.float32, torch.float32]
    assert inputs.equal == {"0.inner": False}


def test_not_a_number_is_the_same_as_itself() -> None:
    module = nn.Sequential(Scaled())
    module[0].factors = [1.0]
    inputs = NarrowInputs({module[0].inner: ("0.inner", module[0])}, {})
    inputs.checking = True
    inputs.remember(module[0], (torch.full((1, 4), float("nan"), dtype=torch.bfloat16),))
    assert inputs.of(module[0].inner, torch.full((1, 4), float("nan"))).dtype == torch.bfloat16


def test_the_self_test_and_the_proof_come_once() -> None:
    model, calls = half_model(), []
    model.base_model.model.lm_head.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr,operator]
    per_sample_gradients(model, text())
    # changed, as it is (which is the truth), and twice alone; what taps say is the pass itself
    assert len(calls) == 5
    per_sample_gradients(model, text())
    assert len(calls) == 6
    assert KNOWN[model].tested == {("right", (False, frozenset()))}
