"""The warm-up folder gives back what was trained, and refuses to be used with another base model."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import LlavaForConditionalGeneration

from icons.batch import model_inputs
from icons.models.adam_state import load_adam_state
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.lora import LoraSettings
from icons.models.warmup_folder import open_warmup, save_warmup
from icons.modules.moments import Trained


def trained(model: nn.Module) -> Trained:
    """Made-up training: every trainable parameter is moved, and has moments."""
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in weights.values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    moments = [
        {name: torch.randn(value.shape, generator=generator) for name, value in weights.items()} for _ in range(2)
    ]
    return Trained({name: value.detach() for name, value in weights.items()}, *moments, 5, (0.9, 0.99), 1e-7)


def save(folder: Path, base: ModelFolder) -> tuple[nn.Module, Trained]:
    model = load_model(base, lora=LoraSettings(rank=2), target="trainable")
    outcome = trained(model)
    save_warmup(
        folder, model, outcome, base, {"preprocessing": {"preset": "llava-train"}, "losses": {"before": {"a": 1.0}}}
    )
    return model, outcome


def test_a_folder_of_a_later_version_is_refused(llava: ModelFolder, tmp_path: Path) -> None:
    save(tmp_path / "warmup", llava)
    file = tmp_path / "warmup" / "icons.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="warmup: has format 2; expected 1: read it with a newer version"):
        open_warmup(tmp_path / "warmup")


def test_a_warmup_folder_gives_back_the_model_and_the_moments(
    llava: ModelFolder, tmp_path: Path, make_batch: Callable[..., dict[str, Any]]
) -> None:
    model, outcome = save(tmp_path / "warmup", llava)
    opened = open_warmup(tmp_path / "warmup")
    again = load_model(opened.model_folder, adapter=opened.adapter, target="trainable")
    batch = model_inputs(make_batch([0, 1, 2]))
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert opened.manifest["preprocessing"] == {"preset": "llava-train"}
    assert opened.facts.losses.before == {"a": 1.0} and opened.facts.losses.after == {}
    state = load_adam_state(tmp_path / "warmup", again)
    assert (state.step, state.betas, state.eps) == (5, (0.9, 0.99), 1e-7)
    for name, value in outcome.exp_avg.items():
        assert torch.equal(state.exp_avg[name], value)
        assert torch.equal(state.exp_avg_sq[name], outcome.exp_avg_sq[name])


def test_peft_itself_reads_the_adapter(huggingface_llava: Path, tmp_path: Path) -> None:
    model, _ = save(tmp_path / "warmup", ModelFolder.open(huggingface_llava))
    base = LlavaForConditionalGeneration.from_pretrained(huggingface_llava)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        theirs = PeftModel.from_pretrained(base, tmp_path / "warmup")
    ids = torch.tensor([[1, 2, 3, 4]])  # no image: the projector is beside the adapter
    assert torch.equal(theirs.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_moved_tree_is_found_again(llava: ModelFolder, original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "here" / "models")
    models = tmp_path / "here" / "models"
    save(
        tmp_path / "here" / "warmup",
        ModelFolder.open(models / "vicuna-tiny", models / "clip", models / "mm_projector.bin"),
    )
    (tmp_path / "here").rename(tmp_path / "there")
    opened = open_warmup(tmp_path / "there" / "warmup")
    assert opened.model_folder.model == (tmp_path / "there" / "models" / "vicuna-tiny").resolve()
    shutil.rmtree(tmp_path / "there" / "models" / "clip")
    with pytest.raises(FileNotFoundError, match=r"its base model \(vision_tower\) was .* which is gone"):
        open_warmup(tmp_path / "there" / "warmup")


def test_refuses_another_base_model(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "models")
    models = tmp_path / "models"
    save(tmp_path / "warmup", ModelFolder.open(models / "vicuna-tiny", models / "clip", models / "mm_projector.bin"))
    config = json.loads((models / "vicuna-tiny" / "config.json").read_text())
    (models / "vicuna-tiny" / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    with pytest.raises(ValueError, match=r"was trained on a base model with fingerprint \w+; .* has \w+"):
        open_warmup(tmp_path / "warmup")


def test_refuses_an_unfinished_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no finished warm-up here \(icons.json is missing\)"):
        open_warmup(tmp_path)


def test_without_moments_there_is_no_moments_file(llava: ModelFolder, tmp_path: Path) -> None:
    """Under DeepSpeed they are in its own checkpoint."""
    model, outcome = save(tmp_path, llava)
    assert (tmp_path / "adam.safetensors").is_file()
    save_warmup(tmp_path, model, Trained(outcome.weights, {}, {}, 0, (0.9, 0.99), 1e-8), llava, {})
    assert not (tmp_path / "adam.safetensors").is_file()
    with pytest.raises(FileNotFoundError, match="no optimizer state here"):
        load_adam_state(tmp_path, model)
