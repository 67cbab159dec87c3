"""Kernels that do not repeat are told to; where they cannot, nothing is taken for wrong that is right."""

import os
import warnings
from threading import Event, Thread
from typing import Any

import pytest
import torch
from small_models import assert_rows_close, llama, one_by_one, text_batch, with_lora
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from icons.gradients import per_sample_gradients, repeatable
from icons.gradients.capture import SlowerPathWarning
from icons.gradients.paths import KNOWN, LAYER, MODULE
from icons.gradients.repeatable import UnrepeatableWarning


class Drift(torch.autograd.Function):
    """A backward pass that is off by three per cent, another three each time, as a GPU's are in bfloat16 after many
    layers."""

    @staticmethod
    def forward(_context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * (1 + 0.03 * torch.randn_like(gradient))


class Louder(nn.Linear):
    """Is not the plain layer that it looks like: by a third."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 1.5)


class Put(nn.Module):
    """Leaves values as they are by an operation without a deterministic kernel."""

    def forward(self, value: Tensor) -> Tensor:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return value


def drifting(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, LlamaDecoderLayer):
            layer.register_forward_hook(lambda _module, _args, output: Drift.apply(output))
    return model


def test_noise_of_kernels_is_not_taken_for_a_wrong_path() -> None:
    torch.manual_seed(0)
    model, batch = drifting(with_lora(llama().bfloat16())), text_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerPathWarning)
        per_sample_gradients(model, batch)


def test_a_wrong_path_is_seen_through_the_noise() -> None:
    torch.manual_seed(0)
    model, layers = llama().bfloat16().requires_grad_(False), {}
    for place, kind in enumerate((nn.Linear, Louder)):
        layers[kind] = model.model.layers[place].self_attn.q_proj = kind(32, 32, bias=False).bfloat16()  # type: ignore[union-attr, index]
    drifting(model)
    per_sample_gradients(model, text_batch())
    known, name_of = KNOWN[model], {parameter: name for name, parameter in model.named_parameters()}
    assert known.path(name_of[layers[nn.Linear].weight]) == LAYER
    assert known.path(name_of[layers[Louder].weight]) == MODULE


def test_deterministic_kernels_are_asked_for_and_settings_are_as_before_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(repeatable, "DRIFTING", ("cpu",))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    model, seen = with_lora(llama()), []
    model.register_forward_pre_hook(
        lambda _module, _args: seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                *(os.environ.get(name) for name in repeatable.SETTINGS),
            )
        )
    )
    per_sample_gradients(model, text_batch())
    assert set(seen) == {(True, False, ":4096:8", "1")}
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert "FLASH_ATTENTION_DETERMINISTIC" not in os.environ


def test_a_model_without_deterministic_kernels_is_computed_and_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeatable, "DRIFTING", ("cpu",))
    model, batch = with_lora(llama()), text_batch()
    put = Put()
    model.get_base_model().model.norm.register_forward_hook(lambda _module, _args, output: put(output))  # type: ignore[operator, union-attr]
    with pytest.warns(UnrepeatableWarning, match=r"PeftModel.*do not repeat bit for bit: put_ does not have") as told:
        found = per_sample_gradients(model, batch)
        per_sample_gradients(model, batch)
    assert len(told) == 1
    assert_rows_close(found, one_by_one(model, batch))


def test_other_errors_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeatable, "DRIFTING", ("cpu",))
    with pytest.raises(RuntimeError, match="my own"):
        repeatable.repeatable(nn.Linear(1, 1), torch.device("cpu"), broken)


def broken() -> None:
    raise RuntimeError("my own")


def test_settings_are_as_before_when_the_last_of_several_threads_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that overlap, the one that began second ends last: what it found was the other's."""
    monkeypatch.setattr(repeatable, "DRIFTING", ("cpu",))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    first_is_in, second_is_in, first_is_out = Event(), Event(), Event()
    seen = []

    def first() -> None:
        first_is_in.set()
        second_is_in.wait(10)

    def second() -> None:
        second_is_in.set()
        first_is_out.wait(10)
        seen.append(torch.are_deterministic_algorithms_enabled())

    cpu = torch.device("cpu")
    one = Thread(target=repeatable.repeatable, args=(nn.Linear(1, 1), cpu, first))
    other = Thread(target=repeatable.repeatable, args=(nn.Linear(1, 1), cpu, second))
    one.start()
    first_is_in.wait(10)
    other.start()
    one.join()
    first_is_out.set()
    other.join()
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
