"""Adam's moments reach the right parameter, whoever saved them; what does not fit is refused."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from icons.models.adam_state import load_adam_state
from icons.models.adam_state.checkpoints import load

DEEPSPEED = Path(__file__).parents[2] / "data" / "deepspeed"


class Layer(nn.Module):
    """A LoRA layer as PEFT names it; A and B of a layer, and of two layers, differ in shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, width + 1, bias=False)})


class Toy(nn.Module):
    """Projector first and language model after, as in transformers 5; the original has it the other way round."""

    def __init__(self, widths: Sequence[int] = (4, 6)) -> None:
        super().__init__()
        projector = nn.ModuleDict({"linear_1": nn.Linear(3, 5), "linear_2": nn.Linear(5, 7)})
        self.multi_modal_projector = projector
        self.language_model = nn.ModuleDict({"layers": nn.ModuleList(Layer(width) for width in widths)})

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


def train(optimizer: torch.optim.Optimizer, steps: int = 3) -> dict[int, dict[str, Tensor]]:
    """A few steps on made-up gradients; the moments by the parameter's identity."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {id(parameter): state for parameter, state in optimizer.state.items()}


def check(path: Path, model: Toy, state: dict[int, dict[str, Tensor]], step: int = 3) -> None:
    found = load_adam_state(path, model)
    assert set(found.exp_avg) == set(found.exp_avg_sq) == set(model.trained())
    for name, parameter in model.trained().items():
        assert torch.equal(found.exp_avg[name], state[id(parameter)]["exp_avg"]), name
        assert torch.equal(found.exp_avg_sq[name], state[id(parameter)]["exp_avg_sq"]), name
    assert (found.step, found.betas, found.eps) == (step, (0.9, 0.95), 1e-7)


def adamw(groups: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-7)


def huggingface_groups(model: Toy) -> list[dict[str, Any]]:
    """The Hugging Face Trainer's: what decays, then biases and norms."""
    named = model.trained().items()
    return [{"params": [value for name, value in named if ("bias" in name) == last]} for last in (False, True)]


def llava_groups(model: Toy) -> list[dict[str, Any]]:
    """LLaVATrainer's four, with `mm_projector_lr`: the second is empty, since LoRA has no bias."""
    named = model.trained().items()
    return [
        {"params": [value for name, value in named if ("projector" in name) == projector and ("bias" in name) == bias]}
        for projector in (False, True)
        for bias in (False, True)
    ]


def original_order(model: Toy) -> list[nn.Parameter]:
    """LoRA first, as the original's modules stand."""
    return sorted(
        model.trained().values(), key=lambda value: any(value is p for p in model.multi_modal_projector.parameters())
    )


@pytest.mark.parametrize("groups", [huggingface_groups, llava_groups, original_order], ids=lambda make: make.__name__)
@pytest.mark.parametrize("target", ["trainable", "lora"])
def test_huggingface_optimizer_file_by_order(tmp_path: Path, groups: Any, target: str) -> None:
    model = Toy()
    optimizer = adamw(groups(model))
    state = train(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    if target == "lora":  # the projector was trained, and is not differentiated now
        model.multi_modal_projector.requires_grad_(False)
    check(tmp_path / "optimizer.pt", model, state)
    check(tmp_path, model, state)  # a checkpoint-N folder


def test_lightning_checkpoint_by_name(tmp_path: Path) -> None:
    model = Toy()
    optimizer = adamw([(name, value) for name, value in reversed(list(model.trained().items()))])
    state = train(optimizer)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"optimizer_states": [optimizer.state_dict()], "state_dict": weights}, tmp_path / "last.ckpt")
    check(tmp_path / "last.ckpt", model, state)
    check(tmp_path, model, state)


def test_lightning_names_with_the_attribute_that_held_the_model(tmp_path: Path) -> None:
    model = Toy()
    optimizer = adamw([(f"net.{name}", value) for name, value in model.trained().items()])
    state = train(optimizer)
    torch.save({"optimizer_states": [optimizer.state_dict()]}, tmp_path / "any.ckpt")
    check(tmp_path / "any.ckpt", model, state)


def test_lightning_checkpoint_by_order(tmp_path: Path) -> None:
    model = Toy()
    optimizer = adamw(list(model.trained().values()))
    state = train(optimizer)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"optimizer_states": [optimizer.state_dict()], "state_dict": weights}, tmp_path / "any.ckpt")
    check(tmp_path / "any.ckpt", model, state)


def warmup_file(folder: Path, model: Toy, state: dict[int, dict[str, Tensor]], **metadata: str) -> Path:
    tensors = {
        f"{which}/{name}": state[id(value)][which].contiguous()
        for name, value in model.trained().items()
        for which in ("exp_avg", "exp_avg_sq")
    }
    save_file(tensors, folder / "adam.safetensors", metadata)
    return folder / "adam.safetensors"


def by_name(model: Toy, optimizer: torch.optim.Optimizer, rename: Any = str) -> dict[str, Any]:
    """As FSDP gathers a state: by name, in the order of the names."""
    names = {id(value): rename(name) for name, value in model.trained().items()}
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    state = {names[id(parameter)]: entry for parameter, entry in optimizer.state.items()}
    return {"state": dict(sorted(state.items())), "param_groups": [group | {"params": sorted(state)}]}


@pytest.mark.parametrize("inside", ["", "optimizer", "optimizer_state_dict"])
def test_moments_by_name_are_never_taken_by_order(tmp_path: Path, inside: str) -> None:
    """Layers of one shape: any order would fit."""
    model = Toy((4, 4, 4))
    optimizer = adamw(list(model.trained().values()))
    state = train(optimizer)
    saved = by_name(model, optimizer, lambda name: f"_fsdp_wrapped_module.{name}")
    torch.save({inside: saved} if inside else saved, tmp_path / "optimizer.bin")
    check(tmp_path / "optimizer.bin", model, state)
    check(tmp_path, model, state)


def test_names_beside_numbers_are_refused(tmp_path: Path) -> None:
    model = Toy()
    optimizer = adamw(list(model.trained().values()))
    train(optimizer)
    saved = by_name(model, optimizer)
    saved["param_groups"][0]["params"] = list(range(len(saved["state"])))
    torch.save(saved, tmp_path / "optimizer.bin")
    with pytest.raises(ValueError, match="names some parameters and numbers others"):
        load_adam_state(tmp_path / "optimizer.bin", model)


def test_a_sharded_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "optimizer_0").mkdir()
    (tmp_path / "optimizer_0" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a sharded checkpoint .* dcp_to_torch FOLDER optimizer.bin"):
        load_adam_state(tmp_path, Toy())


def test_what_is_not_data_is_named(tmp_path: Path) -> None:
    torch.save({"state": {}, "param_groups": [], "who": Path("x")}, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"cannot be read as data alone \(it holds a pathlib"):
        load_adam_state(tmp_path, Toy())


def test_warmup_folder(tmp_path: Path) -> None:
    model = Toy()
    state = train(adamw(list(model.trained().values())))
    file = warmup_file(tmp_path, model, state, step="3", betas="[0.9, 0.95]", eps="1e-07")
    check(tmp_path, model, state)
    check(file, model, state)
    assert load_adam_state(tmp_path, model, form="diagonal").form == "diagonal"
    warmup_file(tmp_path, model, state)
    with pytest.raises(ValueError, match="has no step, betas and eps"):
        load_adam_state(tmp_path, model)


class Stage(nn.Module):
    """The model that the DeepSpeed checkpoints in tests/data were made with, by its names."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        super().__init__()
        for name, values in wanted.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.zeros_like(values["fp32"])))


@pytest.mark.parametrize("stage", ["zero2_world2", "zero3_world2"])
def test_deepspeed_folder(stage: str) -> None:
    wanted = torch.load(DEEPSPEED / stage / "expected.pt", weights_only=True)["expected"]
    found = load_adam_state(DEEPSPEED / stage, Stage(wanted))
    assert (found.step, found.betas, found.eps) == (3, (0.9, 0.999), 1e-8)
    for name, values in wanted.items():
        assert found.exp_avg[name].shape == values["fp32"].shape
        for which in set(values) - {"fp32"}:
            assert torch.equal(getattr(found, which)[name], values[which])


def test_deepspeed_folder_of_the_original_for_a_model_with_new_names() -> None:
    wanted = torch.load(DEEPSPEED / "zero3_world2" / "expected.pt", weights_only=True)["expected"]
    new = {"mm_projector.0": "multi_modal_projector.linear_1", "mm_projector.2": "multi_modal_projector.linear_2"}
    renamed = {}
    for name, values in wanted.items():
        current = name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        for old, now in new.items():
            current = current.replace(old, now)
        renamed[f"language_model.{current}" if "lora" in name else current] = values
    found = load_adam_state(DEEPSPEED / "zero3_world2", Stage(renamed))
    for name, values in renamed.items():
        assert torch.equal(found.exp_avg[name], values["exp_avg"])


def test_steps_in_all_their_forms(tmp_path: Path) -> None:
    model = Toy()
    optimizer = adamw(list(model.trained().values()))
    state = train(optimizer)
    saved = optimizer.state_dict()
    for form in (3, 3.0, torch.tensor(3), torch.tensor([3.0])):
        for entry in saved["state"].values():
            entry["step"] = form
        torch.save(saved, tmp_path / "optimizer.pt")
        check(tmp_path, model, state)
    for entry in saved["state"].values():
        del entry["step"]
    saved["param_groups"][0]["step"] = 3
    torch.save(saved, tmp_path / "optimizer.pt")
    check(tmp_path, model, state)
    del saved["param_groups"][0]["step"]
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="has no step, which Adam's bias correction needs"):
        load_adam_state(tmp_path, model)


def test_steps_that_differ_are_kept_by_name(tmp_path: Path) -> None:
    model = Toy()
    optimizer = adamw(list(model.trained().values()))
    train(optimizer)
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = 2
    torch.save(saved, tmp_path / "optimizer.pt")
    found = load_adam_state(tmp_path, model)
    assert isinstance(found.step, dict)
    assert [found.step[name] for name in model.trained()][:2] == [2, 3]


def saved_state(model: Toy) -> dict[str, Any]:
    optimizer = adamw(list(model.trained().values()))
    train(optimizer)
    return optimizer.state_dict()


def test_refuses_the_state_of_another_model(tmp_path: Path) -> None:
    torch.save(saved_state(Toy((4, 6, 8))), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"groups of \[10\] parameters, and no order .* fits \(the model has 8"):
        load_adam_state(tmp_path, Toy())
    torch.save(saved_state(Toy((4, 7))), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="no order of the model's parameters fits"):
        load_adam_state(tmp_path, Toy())


def test_refuses_moments_that_could_be_either_parameters(tmp_path: Path) -> None:
    class Twins(nn.Module):
        """Decaying weights and norms of one shape: with or without a group of their own, both orders fit."""

        def __init__(self) -> None:
            super().__init__()
            self.multi_modal_projector = nn.Linear(2, 2, bias=False)
            self.lora_A = nn.Linear(2, 2, bias=False)

    model = Twins()
    optimizer = adamw(list(model.parameters()))
    train(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="more than one order of the model's parameters fits"):
        load_adam_state(tmp_path, model)


def test_refuses_another_shape_under_the_right_name(tmp_path: Path) -> None:
    model = Toy()
    saved = saved_state(model)
    saved["param_groups"][0]["param_names"] = list(model.trained())
    saved["state"][0]["exp_avg"] = torch.zeros(1, 2)
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"exp_avg of .* has shape \(1, 2\), the parameter .* \(5, 3\)"):
        load_adam_state(tmp_path, model)


def test_refuses_a_parameter_without_moments(tmp_path: Path) -> None:
    model = Toy()
    saved = saved_state(model)
    del saved["state"][2]
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"holds nothing for 1 of the 8 parameters .*linear_2.weight"):
        load_adam_state(tmp_path, model)


def test_refuses_what_is_not_adam(tmp_path: Path) -> None:
    model = Toy()
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),):
        train(optimizer)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        with pytest.raises(ValueError, match="betas and eps are missing; expected Adam"):
            load_adam_state(tmp_path, model)
    saved = saved_state(model)
    for entry in saved["state"].values():
        del entry["exp_avg_sq"]
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="has no exp_avg_sq; expected the state of Adam"):
        load_adam_state(tmp_path, model)


def test_refuses_what_is_no_optimizer_state(tmp_path: Path) -> None:
    model = Toy()
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_adam_state(tmp_path / "nothing", model)
    with pytest.raises(FileNotFoundError, match="no optimizer state here"):
        load_adam_state(tmp_path, model)
    for content, text in (
        (OrderedDict(weight=torch.zeros(1)), "is no optimizer state"),
        ([1, 2], "holds a list"),
        ({"optimizer_states": []}, "states of 0 optimizers, expected one"),
        ({"anything": Path("x")}, "cannot be read as data alone"),
    ):
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=text):
            load_adam_state(tmp_path / "file.pt", model)


def test_refuses_a_frozen_model(tmp_path: Path) -> None:
    model = Toy()
    torch.save(saved_state(model), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="no trainable parameter"):
        load_adam_state(tmp_path, model.requires_grad_(False))


def test_moments_that_were_read_do_not_change_with_their_file(tmp_path: Path) -> None:
    file = tmp_path / "optimizer.pt"
    torch.save({"state": {0: {"exp_avg": torch.ones(1000)}}, "param_groups": []}, file)
    moments = load(file)["state"][0]["exp_avg"]
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(moments, torch.ones(1000))
