"""Adapters of every origin are set tensor by tensor, or refused by the tensor's name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from icons.batch import model_inputs
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.lora import LLAVA_TARGETS, LoraSettings, add_lora, default_targets
from icons.models.saved_adapter import load_adapter, merge_into


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "lora"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")


def configure(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("model.model.model.layers", "model.model.model.language_model.layers"),
        lambda name: name.replace("model.model.model.layers", "model.model.language_model.model.layers"),
    ],
    ids=["transformers 5", "transformers 4, Hugging Face layout"],
)
def test_an_adapter_under_any_naming_gives_the_same_model(
    llava: ModelFolder,
    adapter: Path,
    copied: Path,
    make_batch: Callable[..., dict[str, Any]],
    rename: Callable[[str], str],
) -> None:
    rewrite(copied, lambda tensors: {rename(name): value for name, value in tensors.items()})
    batch = model_inputs(make_batch([0]))
    assert torch.equal(
        load_model(llava, adapter=adapter)(**batch).logits, load_model(llava, adapter=copied)(**batch).logits
    )


def test_only_modules_with_weights_are_wrapped(llava: ModelFolder, copied: Path) -> None:
    rewrite(
        copied,
        lambda tensors: {name: value for name, value in tensors.items() if "layers.1" in name and "q_proj" in name},
    )
    model = load_model(llava, adapter=copied)
    wrapped = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(wrapped) == 2
    assert all("layers.1.self_attn.q_proj.lora_" in name for name in wrapped)


def test_rank_stabilised_scaling_is_kept(llava: ModelFolder, copied: Path) -> None:
    configure(copied, use_rslora=True)
    model: Any = load_model(llava, adapter=copied)
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    assert layer.scaling["default"] == 8 / 4**0.5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: dict(list(tensors.items())[1:]), "no tensor for 1 parameter of the adapter|has no place"),
        (
            lambda tensors: tensors | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)},
            r"1 module that the model lacks, such as model.language_model.layers.9.mlp.up_proj",
        ),
        (lambda tensors: tensors | {"base_model.model.other.weight": torch.zeros(1)}, "other.weight has no place"),
        (lambda tensors: {name: value[:, :3] for name, value in tensors.items()}, r"has shape \(\d+, 3\), the model's"),
        (lambda tensors: {"x": torch.zeros(1)}, r"holds no LoRA tensor \(got 1 other\)"),
    ],
    ids=["missing", "unknown module", "stranger", "shape", "none"],
)
def test_refuses_adapters_that_do_not_fit(llava: ModelFolder, copied: Path, change: Any, text: str) -> None:
    rewrite(copied, lambda tensors: {name: value.contiguous() for name, value in change(tensors).items()})
    with pytest.raises(ValueError, match=text):
        load_model(llava, adapter=copied)


def test_refuses_half_a_pair_by_name(llava: ModelFolder, copied: Path) -> None:
    rewrite(
        copied,
        lambda tensors: {name: value for name, value in tensors.items() if "layers.0.mlp.up_proj.lora_B" not in name},
    )
    with pytest.raises(
        ValueError, match=r"no tensor for 1 parameter of the adapter, such as .*layers.0.mlp.up_proj.lora_B"
    ):
        load_model(llava, adapter=copied)


def test_refuses_other_kinds_of_adapter(llava: ModelFolder, copied: Path, tmp_path: Path) -> None:
    configure(copied, use_dora=True)
    with pytest.raises(ValueError, match=r"no tensor for \d+ parameters of the adapter, .*lora_magnitude_vector"):
        load_model(llava, adapter=copied)
    with pytest.raises(ValueError, match=r"is DoRA \(use_dora\); expected plain LoRA on a vision tower"):
        merge_into({}, copied)
    configure(copied, use_dora=False, target_parameters=["experts.gate_up_proj"])
    with pytest.raises(ValueError, match=r"adapts single parameters \(target_parameters \['experts.gate_up_proj'\]\)"):
        load_model(llava, adapter=copied)
    configure(copied, peft_type="IA3")
    with pytest.raises(ValueError, match="peft_type is 'IA3'; expected 'LORA'"):
        load_model(llava, adapter=copied)
    with pytest.raises(FileNotFoundError, match="no adapter here"):
        load_adapter(nn.Linear(1, 1), tmp_path)
    (copied / "adapter_model.safetensors").unlink()
    configure(copied, peft_type="LORA", use_dora=False, target_parameters=None)
    with pytest.raises(FileNotFoundError, match=r"has adapter_config.json and no weights"):
        load_adapter(nn.Linear(1, 1), copied)


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(config)


def test_refuses_a_second_adapter_and_targets_that_match_nothing() -> None:
    with pytest.raises(ValueError, match=r"'nothing': match no module; expected .* names such as \['model.layers.0"):
        add_lora(tiny_llama(), LoraSettings(targets="nothing"))
    model = add_lora(tiny_llama(), LoraSettings(rank=2))
    with pytest.raises(ValueError, match="the model has LoRA layers already"):
        add_lora(model.get_base_model(), LoraSettings(rank=2, targets=r".*base_layer"))


def test_own_targets_and_no_dropout() -> None:
    model = add_lora(tiny_llama(), LoraSettings(rank=2, targets=r".*\.(q|v)_proj"))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2
    assert not any(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_generic_adapter_with_a_saved_module_loads(tmp_path: Path) -> None:
    """`modules_to_save`: PEFT keeps a trained copy of the output layer."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    trained = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1)
    trained.eval().save_pretrained(tmp_path / "adapter")
    model = load_model(ModelFolder.open(tmp_path / "base"), adapter=tmp_path / "adapter", target="trainable")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, trained(ids).logits)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lm_head.modules_to_save" in name for name in names)
    assert len(names) == 3


def test_llavas_targets_are_its_seven_linear_layers(llava: ModelFolder) -> None:
    model = load_model(llava)
    assert default_targets(model) == LLAVA_TARGETS
    wrapped = add_lora(model, LoraSettings(rank=2))
    assert isinstance(wrapped, PeftModel)
    names = {
        name.partition(".lora_A")[0].rpartition(".")[2] for name, _ in wrapped.named_parameters() if "lora_A" in name
    }
    assert names == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_merges_xtuners_adapter_into_the_tower(original: Path, tmp_path: Path) -> None:
    """Against PEFT's own merge, under the old names of CLIP's layers."""
    tower = CLIPVisionModel.from_pretrained(original / "clip")
    weights = {name: value.clone() for name, value in tower.state_dict().items()}
    tuned = get_peft_model(tower, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "fc1"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {
        name if "vision_model." in name else name.replace("base_model.model.", "base_model.model.vision_model."): value
        for name, value in tensors.items()
    })  # fmt: skip
    merged = merge_into(weights, tmp_path)
    for name, value in tuned.merge_and_unload().state_dict().items():  # type: ignore[operator]
        torch.testing.assert_close(merged[name], value)
    with pytest.raises(ValueError, match="which the vision tower lacks"):
        merge_into({"x.weight": torch.zeros(1)}, tmp_path)
