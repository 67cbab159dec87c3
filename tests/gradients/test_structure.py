"""What is kept from batch to batch is given up as soon as the model is another; nothing of a pass outlives it."""

import gc
import weakref
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import pytest
import torch
from small_models import assert_rows_close, image_batch, llama, llava, one_by_one, text_batch, with_lora
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization

from icons.gradients import capture, per_sample_gradients, projected_gradients
from icons.gradients.capture import SlowerPathWarning
from icons.gradients.garbage import no_collection
from icons.gradients.per_sample import weighted_gradient as weighted
from icons.gradients.proof import prove
from icons.gradients.structure import members_of
from icons.projection import CountSketch


def layer_of(model: nn.Module) -> Any:
    return model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")


def louder(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output * 1.7


def swap_hooks(model: nn.Module) -> None:
    layer = layer_of(model).lora_B["default"]
    layer._forward_hooks.clear()
    layer.register_forward_hook(louder)


def swap_hook_in_its_place(model: nn.Module) -> None:
    hooks = layer_of(model).lora_B["default"]._forward_hooks
    hooks[next(iter(hooks))] = louder


def swap_logits_hook_in_its_place(model: nn.Module) -> None:
    head = model.get_submodule("base_model.model.lm_head")
    handle = head.register_forward_hook(lambda _module, _args, output: output + 0)
    per_sample_gradients(model, text_batch())
    head._forward_hooks[handle.id] = by_position


def turn_up_a_hook(model: nn.Module) -> None:
    """Its code stays the same."""
    louder_by = [1.0]
    layer = layer_of(model).lora_A["default"]
    layer.register_forward_pre_hook(lambda _module, args: (args[0] * louder_by[0],))
    layer.register_forward_hook(lambda _module, _args, output: output * louder_by[0])
    layer.weight.register_hook(lambda gradient: gradient * louder_by[0])
    per_sample_gradients(model, text_batch())
    louder_by[0] = 1.7


class Louder(nn.Linear):
    by = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.by)


def turn_up_a_layer(model: nn.Module) -> None:
    layer = layer_of(model).lora_B["default"]
    layer.__class__ = Louder
    per_sample_gradients(model, text_batch())
    layer.by = 1.7


class Heavier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.7


def parametrize(model: nn.Module) -> None:
    register_parametrization(layer_of(model).lora_B["default"], "weight", Heavier())


def change_numbers(model: nn.Module) -> None:
    """All that is no structure: other numbers, sizes and settings."""
    layer = layer_of(model)
    layer.scaling["default"] = 7.0
    layer.lora_A["default"].weight.data = 0.1 * torch.ones(5, 32)
    layer.lora_B["default"].weight.data = torch.linspace(-1, 1, 160).view(32, 5)
    model.get_submodule("base_model.model.model.layers.0.input_layernorm").variance_epsilon = 0.5  # type: ignore[assignment]
    model.get_submodule("base_model.model.model.rotary_emb").inv_freq.mul_(1.5)  # type: ignore[operator]
    model.get_submodule("base_model.model.model.layers.0.mlp").act_fn = nn.ReLU()
    model.config.use_cache = True  # type: ignore[union-attr]


def train_others(model: nn.Module) -> None:
    layer_of(model).lora_A["default"].weight.requires_grad_(False)
    model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").weight.requires_grad_(True)  # type: ignore[operator]


def checkpoint(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    model.train()


def swap_layer(model: nn.Module) -> None:
    layer = nn.Linear(32, 3, bias=False)
    layer.register_forward_hook(louder)
    layer_of(model).lora_A["default"] = layer


def patch_forward(model: nn.Module) -> None:
    layer = layer_of(model).lora_B["default"]
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 1.7


def share_layer(model: nn.Module) -> None:
    other = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    other.lora_A["default"] = layer_of(model).lora_A["default"]  # type: ignore[index, operator]


def patch_forward_again(model: nn.Module) -> None:
    """The second function has the address of the first, which has gone."""
    layer = layer_of(model).lora_B["default"]
    layer.forward = lambda x: functional.linear(x, layer.weight)
    per_sample_gradients(model, text_batch())
    del layer.forward
    layer.forward = lambda x: functional.linear(x, layer.weight * 1.7)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def change_what_a_layer_gets(model: nn.Module) -> None:
    layer_of(model).lora_dropout["default"] = Twice()


class Own(nn.Linear):
    pass


def patch_class(model: nn.Module) -> None:
    layer = layer_of(model).lora_B["default"]
    layer.__class__ = Own
    per_sample_gradients(model, text_batch())
    Own.forward = lambda self, x: functional.linear(x, self.weight * 1.7)  # type: ignore[method-assign]


def mask_gradient(model: nn.Module) -> None:
    weight = layer_of(model).lora_B["default"].weight
    weight.register_hook(lambda gradient: gradient * (torch.arange(len(gradient)) > 4)[:, None])


def by_position(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output * (1 + torch.arange(output.shape[1]))[:, None]


def scale_logits_by_position(model: nn.Module) -> None:
    model.get_submodule("base_model.model.lm_head").register_forward_hook(by_position)


@pytest.mark.filterwarnings("ignore::icons.gradients.self_test.WholeLogitsWarning")
@pytest.mark.filterwarnings("ignore::icons.gradients.capture.SlowerPathWarning")
@pytest.mark.parametrize(
    "change",
    [
        swap_hooks,
        swap_hook_in_its_place,
        swap_logits_hook_in_its_place,
        turn_up_a_hook,
        turn_up_a_layer,
        parametrize,
        change_numbers,
        train_others,
        checkpoint,
        swap_layer,
        patch_forward,
        patch_forward_again,
        patch_class,
        mask_gradient,
        share_layer,
        change_what_a_layer_gets,
        scale_logits_by_position,
    ],
)
def test_a_change_between_two_passes_is_seen(change: Callable[[nn.Module], None]) -> None:
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    layer_of(model).base_layer.bfloat16()
    layer_of(model).register_forward_pre_hook(lambda _module, args: args[0].bfloat16())
    layer_of(model).register_forward_hook(lambda _module, _args, output: output.float())
    layer_of(model).lora_B["default"].register_forward_hook(lambda _module, _args, output: output + 0)
    for _ in range(2):
        assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))
    change(model)
    assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


def test_a_model_that_hooks_itself_in_its_first_pass_is_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, proofs = with_lora(llama(), ["q_proj"]), text_batch(), list[int]()

    def hook_once(_module: nn.Module, _args: Any) -> None:
        handle.remove()
        layer_of(model).register_forward_hook(lambda _module, _args, output: output + 0)

    def counted(*args: Any) -> Any:
        proofs.append(1)
        return prove(*args)

    handle = layer_of(model).register_forward_pre_hook(hook_once)
    monkeypatch.setattr(capture, "prove", counted)
    for _ in range(3):
        assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))
    assert len(proofs) == 1


def test_a_weight_with_hooks_of_its_gradient_is_announced_as_slow() -> None:
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    layer_of(model).lora_B["default"].weight.register_hook(lambda gradient: gradient * 1.7)
    with pytest.warns(SlowerPathWarning, match="1 trainable parameters"):
        found = per_sample_gradients(model, batch)
    assert_rows_close(found, one_by_one(model, batch))


def test_a_hook_of_all_modules_is_seen_while_it_is_there() -> None:
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    layer = layer_of(model).lora_B["default"]
    rows = per_sample_gradients(model, batch)
    handle = register_module_forward_hook(lambda module, _args, output: output * 1.7 if module is layer else None)
    try:
        assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))
    finally:
        handle.remove()
    assert_rows_close(per_sample_gradients(model, batch), rows)


def test_a_module_that_stands_elsewhere_gives_its_parameters_other_names() -> None:
    model: Any = nn.ModuleDict({"a": nn.ModuleDict(), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    for part in ("b", "c"):
        model["a"]["inner"] = model[part]
        expected = {name: id(parameter) for name, parameter in model.named_parameters()}
        assert {name: id(parameter) for name, parameter in members_of(model).trainable.items()} == expected


def test_adapters_are_switched_added_and_deleted() -> None:
    model, batch = with_lora(llama(), ["q_proj", "down_proj"]), text_batch()
    adapted: Any = model
    for step in (
        lambda: adapted.add_adapter("second", adapted.peft_config["default"]),
        lambda: adapted.set_adapter("second"),
        lambda: adapted.set_adapter("default"),
        lambda: adapted.delete_adapter("second"),
    ):
        step()
        model.eval()  # a new adapter is in train mode
        assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


@pytest.mark.parametrize(
    "make",
    [
        lambda: (with_lora(llama()), text_batch()),
        lambda: (with_lora(llava(), r".*language_model.*_proj"), image_batch()),
    ],
)
def test_the_first_pass_which_is_its_own_proof_gives_the_bits_of_the_next(make: Any) -> None:
    model, batch = make()
    found = [projected_gradients(model, batch, CountSketch(97)) for _ in range(3)]
    for other in found[1:]:
        for field in ("gradient", "norm", "loss"):
            assert torch.equal(getattr(found[0], field), getattr(other, field))


def test_no_model_lives_longer_for_what_is_known_of_it() -> None:
    model = with_lora(llama(), ["q_proj"])
    per_sample_gradients(model, text_batch())
    watched = [weakref.ref(model), weakref.ref(layer_of(model))]
    del model
    gc.collect()
    assert [one() for one in watched] == [None, None]


def test_a_structure_is_kept_while_it_holds() -> None:
    model = with_lora(llama(), ["q_proj"])
    first = members_of(model)
    assert members_of(model).structure is first.structure
    assert list(first.trainable) == [name for name, value in model.named_parameters() if value.requires_grad]
    layer_of(model).requires_grad_(False)
    assert members_of(model).structure is not first.structure
    with pytest.raises(ValueError, match="no trainable parameter"):
        members_of(model.requires_grad_(False))


def test_threads_take_turns_with_a_model() -> None:
    model, batch, inside, found = with_lora(llama(), ["q_proj"]), text_batch(), Event(), list[Tensor]()
    expected = one_by_one(model, batch)
    weights = torch.tensor([1.0, -2.0, 0.5])
    threads = [
        Thread(target=lambda: found.append(per_sample_gradients(model, batch))),
        Thread(target=lambda: found.append(torch.cat([g.flatten() for g in weighted(model, batch, weights).values()]))),
    ]

    def meanwhile(_module: nn.Module, _args: Any, _output: Tensor) -> None:
        if not inside.is_set():
            inside.set()
            for thread in threads:
                thread.start()
                thread.join(0.2)

    layer_of(model).register_forward_hook(meanwhile)
    assert_rows_close(per_sample_gradients(model, batch), expected)
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for rows in found:
        assert_rows_close(rows.view(-1, expected.shape[1]), expected if rows.ndim == 2 else (weights @ expected)[None])


def test_garbage_is_looked_for_again_when_the_last_pass_is_over() -> None:
    inside, leave, seen = Event(), Event(), []

    def other() -> None:
        with no_collection():
            inside.set()
            leave.wait(10)

    thread = Thread(target=other)
    with pytest.raises(ZeroDivisionError), no_collection():
        thread.start()
        inside.wait(10)
        raise ZeroDivisionError
    seen.append(gc.isenabled())
    leave.set()
    thread.join()
    assert seen == [False] and gc.isenabled()
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
