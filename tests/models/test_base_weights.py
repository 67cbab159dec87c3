"""Base models of each layout are read whole, or refused by what is missing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from icons.batch import model_inputs
from icons.models.folder import ModelFolder
from icons.models.loading import load_model

Batches = Callable[..., dict[str, Any]]


@pytest.fixture
def models(original: Path, tmp_path: Path) -> Path:
    """A copy of the original's folders, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "models"))


def opened(models: Path, **parts: Path) -> ModelFolder:
    given = {"vision_tower": models / "clip", "mm_projector": models / "mm_projector.bin"} | parts
    return ModelFolder.open(models / "vicuna-tiny", **given)


def logits(folder: ModelFolder, make_batch: Batches) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(**model_inputs(make_batch([0, 1]))).logits


def test_pytorch_shards_give_the_same_model(models: Path, llava: ModelFolder, make_batch: Batches) -> None:
    """As Vicuna comes: `pytorch_model-0000x-of-*.bin`, and rotary buffers that nobody needs."""
    folder = models / "vicuna-tiny"
    weights = load_file(folder / "model.safetensors")
    names, index = sorted(weights), {}
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{part}-of-00002.bin"
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)} if part == 1 else {}
        torch.save({name: weights[name] for name in chosen} | extra, folder / file)
        index |= dict.fromkeys([*chosen, *extra], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits(opened(models), make_batch), logits(llava, make_batch))


def test_xtuners_projector_file_gives_the_same_model(models: Path, llava: ModelFolder, make_batch: Batches) -> None:
    projector = torch.load(models / "mm_projector.bin", weights_only=True)
    (models / "xtuner" / "projector").mkdir(parents=True)
    xtuner = {name.replace("model.mm_projector.", "model."): value for name, value in projector.items()}
    save_file(xtuner, models / "xtuner" / "projector" / "model.safetensors")
    found = opened(models, mm_projector=models / "xtuner")
    assert torch.equal(logits(found, make_batch), logits(llava, make_batch))


def test_projector_and_tuned_tower_among_the_weights(models: Path, llava: ModelFolder, make_batch: Batches) -> None:
    """As in liuhaotian/llava-v1.5 and xtuner's `-hf` folders; the tower's weights there go before CLIP's."""
    folder = models / "vicuna-tiny"
    weights = load_file(folder / "model.safetensors") | torch.load(models / "mm_projector.bin", weights_only=True)
    tower = load_file(models / "clip" / "model.safetensors")
    tuned = {name: value + 0.01 for name, value in tower.items()}
    whole = weights | {f"model.vision_tower.vision_tower.{name}": value for name, value in tuned.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    llava_config = {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": str(models / "clip")}
    (folder / "config.json").write_text(json.dumps(config | llava_config))
    found = logits(ModelFolder.open(folder), make_batch)
    assert not torch.equal(found, logits(llava, make_batch))
    save_file(tuned, models / "clip" / "model.safetensors", {"format": "pt"})  # the same, where CLIP's own weights are
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(found, logits(ModelFolder.open(folder), make_batch))
    half = dict(list(whole.items())[: len(weights) + 3])
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="its vision tower lacks"):
        load_model(ModelFolder.open(folder))


def test_old_names_of_the_huggingface_layout(huggingface_llava: Path) -> None:
    """`language_model.model.` and `vision_tower.vision_model.`, as transformers 4 wrote them."""
    file = huggingface_llava / "model.safetensors"
    before = load_model(ModelFolder.open(huggingface_llava)).state_dict()
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in load_file(file).items()
    }
    assert any(name.startswith("language_model.model.") for name in weights)
    save_file(weights, file, {"format": "pt"})
    after = load_model(ModelFolder.open(huggingface_llava)).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("part", ["vicuna-tiny", "clip"])
def test_refuses_missing_weights_by_name(models: Path, part: str) -> None:
    file = models / part / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if "mlp" in name)
    save_file({name: value for name, value in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"has no weights for 1 parameter, such as .*{lost.rpartition('.layers.')[2]}"
    ):
        load_model(opened(models))


def test_refuses_a_projector_that_is_missing_or_of_another_size(models: Path) -> None:
    file = models / "mm_projector.bin"
    projector = torch.load(file, weights_only=True)
    torch.save({name: value[:3] for name, value in projector.items()}, file)
    with pytest.raises(ValueError, match=r"linear_1.weight has shape \(3, 16\), expected \(32, 16\)"):
        load_model(opened(models))
    torch.save(dict(list(projector.items())[:3]), file)
    with pytest.raises(ValueError, match=r"the projector needs .*linear_2.bias; got .*: give --mm-projector"):
        load_model(opened(models))
    with pytest.raises(ValueError, match="got none of them"):
        load_model(ModelFolder.open(models / "vicuna-tiny", models / "clip"))


def test_refuses_other_towers_and_language_models(models: Path) -> None:
    for part, change, text in (
        ("clip", {"model_type": "siglip_vision_model"}, "model_type is 'siglip_vision_model'; expected a CLIP folder"),
        ("vicuna-tiny", {"model_type": "mpt"}, "model_type is 'mpt'; in LLaVA's original layout only Llama"),
    ):
        config = json.loads((models / part / "config.json").read_text())
        (models / part / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=text):
            load_model(opened(models))


@pytest.mark.parametrize("saved", ["eager", "flash_attention_2"])
@pytest.mark.parametrize("layout", ["original", "huggingface"])
def test_the_kernel_asked_for_wins_over_the_one_that_a_config_names(
    saved: str, layout: str, models: Path, huggingface_llava: Path
) -> None:
    """As fine-tuning scripts leave it in config.json; flash attention is not even installed here."""
    folder = opened(models) if layout == "original" else ModelFolder.open(huggingface_llava)
    for place in (folder.model, *([models / "clip"] if layout == "original" else [])):
        config = json.loads((place / "config.json").read_text()) | {"_attn_implementation": saved}
        for name in ("text_config", "vision_config"):
            if name in config:
                config[name]["_attn_implementation"] = saved
        (place / "config.json").write_text(json.dumps(config))
    model: Any = load_model(folder, attention="sdpa")
    parts = (model.model.language_model, model.model.vision_tower)
    assert [part.config._attn_implementation for part in parts] == ["sdpa", "sdpa"]
