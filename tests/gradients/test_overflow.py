"""A pass that does not fit a GPU's memory comes again, with nothing left of the first, and gives the same."""

import weakref
from typing import Any

import pytest
import torch
from small_models import assert_rows_close, llama, one_by_one, text_batch, with_lora
from torch import Tensor

from icons.gradients import per_sample_gradients
from icons.gradients.overflow import copied_to_cpu, overflowing


def test_the_second_attempt_finds_nothing_of_the_first_in_memory() -> None:
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    layers = model.get_submodule("base_model.model.model.layers")
    made: list[weakref.ref[Tensor]] = []
    attempts: list[list[bool]] = []

    def fails_once(_module: Any, args: tuple[Any, ...], _output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        attempts.append([each() is None for each in made])
        made.append(weakref.ref(args[0]))
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = layers[-1].register_forward_hook(fails_once)  # type: ignore[index]
    rows = per_sample_gradients(model, batch)
    handle.remove()
    assert attempts[:2] == [[], [True]]
    assert_rows_close(rows, one_by_one(model, batch))


def test_what_is_saved_while_the_device_is_full_comes_back_as_it_was() -> None:
    full, device = [False, True, True, False, True], torch.device("cpu")
    asked = iter(full * 10)
    x = torch.randn(4, 4, requires_grad=True)
    truth = torch.autograd.grad((x.sin() * x.exp()).pow(3).sum(), x)[0]
    copies = []
    with copied_to_cpu(device, lambda: copies.append(next(asked)) or copies[-1]):  # type: ignore[func-returns-value]
        result = (x.sin() * x.exp()).pow(3).sum()
    assert torch.equal(torch.autograd.grad(result, x)[0], truth)
    assert any(copies) and not all(copies)


def test_three_quarters_of_what_is_ours_are_kept_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    cuda, held = torch.cuda, [59.0]
    monkeypatch.setattr(cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(cuda, "mem_get_info", lambda _device: (50, 200))
    monkeypatch.setattr(cuda, "memory_reserved", lambda _device: 30)
    monkeypatch.setattr(cuda, "get_per_process_memory_fraction", lambda _device: 0.5)
    monkeypatch.setattr(cuda, "memory_allocated", lambda _device: held[0])

    def copied(device: torch.device, full: Any) -> Any:
        asked.append((device, full))
        return torch.enable_grad()

    monkeypatch.setattr("icons.gradients.overflow.copied_to_cpu", copied)
    with overflowing(torch.device("cuda", 1)):
        ((device, full),) = asked
        assert device == torch.device("cuda", 1) and not full()
        held[0] = 61.0
        assert full()
    with overflowing(torch.device("cpu")):
        assert len(asked) == 1
