"""What a model folder is, is told from its JSON files; what cannot be used is refused with what to do."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from icons.models.folder import ModelFolder, features

DATA = Path(__file__).parents[1] / "data" / "original_llava"
CLIP = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
LLAVA = {
    "model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip",
    "vocab_size": 32000, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "tokenizer_model_max_length": 1024,
}  # fmt: skip


def make(folder: Path, config: dict[str, Any], *others: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_original_base_folder_with_its_parts() -> None:
    found = ModelFolder.open(DATA / "vicuna-tiny", DATA / "clip", DATA / "mm_projector.bin")
    assert (found.layout, found.kind, found.template) == ("original", "llava", "v1")
    assert (found.image_token_id, found.image_tokens, found.select_layer) == (-200, 16, -2)
    assert found.mm_projector == DATA / "mm_projector.bin"
    assert found.image_processor == DATA / "clip"
    assert ModelFolder.from_dict(json.loads(json.dumps(found.as_dict()))).fingerprint() == found.fingerprint()


def test_a_folder_of_the_projector_will_do() -> None:
    assert ModelFolder.open(DATA / "vicuna-tiny", DATA / "clip", DATA).mm_projector == DATA / "mm_projector.bin"


@pytest.mark.parametrize("given", ["xtuner", "xtuner/projector", "xtuner/projector/model.safetensors"])
def test_xtuners_projector_and_the_adapter_of_its_tower(tmp_path: Path, given: str) -> None:
    model = make(tmp_path / "llama", {"model_type": "llama", "vocab_size": 128256})
    clip = make(tmp_path / "clip", CLIP)
    make(tmp_path / "xtuner" / "visual_encoder_adapter", {}, "adapter_config.json")
    make(tmp_path / "xtuner" / "projector", {}, "model.safetensors")
    found = ModelFolder.open(model, clip, tmp_path / given)
    assert found.mm_projector == tmp_path / "xtuner" / "projector" / "model.safetensors"
    assert (found.tower_adapter is None) == given.endswith(".safetensors")
    assert found.image_tokens == 576


def test_xtuners_whole_folder(tmp_path: Path) -> None:
    """Llama-3 at the root, the projector below it."""
    model = make(tmp_path / "m", {"model_type": "llama", "vocab_size": 128256}, "projector/model.safetensors")
    found = ModelFolder.open(model, make(tmp_path / "clip", CLIP))
    assert found.mm_projector == model / "projector" / "model.safetensors"


def test_llava_folders_are_told_by_their_projector_not_by_model_type(tmp_path: Path) -> None:
    clip = make(tmp_path / "clip", CLIP)
    for model_type in ("llava", "llava_llama", "llama"):
        model = make(tmp_path / model_type, LLAVA | {"model_type": model_type, "mm_vision_tower": str(clip)})
        found = ModelFolder.open(model)
        assert (found.layout, found.vision_tower, found.max_length) == ("original", clip, 1024)
        assert found.mm_projector is None


def test_class_token_counts_where_it_is_kept(tmp_path: Path) -> None:
    model = make(tmp_path / "llava", LLAVA | {"mm_vision_select_feature": "cls_patch"})
    assert ModelFolder.open(model, make(tmp_path / "clip", CLIP)).image_tokens == 577
    assert features({"image_size": 384, "patch_size": 14, "model_type": "siglip_vision_model"}, whole=True) == 729


def test_mpt_has_its_own_template(tmp_path: Path) -> None:
    model = make(tmp_path / "mpt", LLAVA | {"model_type": "mpt"})
    assert ModelFolder.open(model, make(tmp_path / "clip", CLIP)).template == "mpt"


def test_a_llava_whose_images_vary_is_left_to_its_processor(tmp_path: Path) -> None:
    config = {"model_type": "llava", "image_token_index": 10, "vision_config": {"model_type": "pixtral"}}
    found = ModelFolder.open(make(tmp_path / "pixtral", config))
    assert (found.kind, found.image_token_id, found.template) == ("image-text", 10, "chat")


def test_text_models_have_no_images(tmp_path: Path) -> None:
    found = ModelFolder.open(make(tmp_path / "m", {"model_type": "llama", "vocab_size": 32000}))
    assert (found.kind, found.image_token_id, found.image_tokens, found.image_processor) == ("text", None, 0, None)


def test_fingerprint_follows_files_not_places(tmp_path: Path) -> None:
    one = ModelFolder.open(make(tmp_path / "a", {"model_type": "llama"}, "model.safetensors"))
    two = ModelFolder.open(make(tmp_path / "b", {"model_type": "llama"}, "model.safetensors"))
    assert one.fingerprint() == two.fingerprint()
    (tmp_path / "b" / "model.safetensors").write_bytes(b"x")
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear', expected 'mlp2x_gelu'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is 'cls'"),
        ({}, r"its vision tower \(openai/clip\) is not a folder here; give --vision-tower"),
    ],
)
def test_refuses_llavas_it_does_not_know(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelFolder.open(make(tmp_path / "m", LLAVA | change))


def test_refuses_adapters_and_warmup_folders_as_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is an adapter .* give the base model as --model"):
        ModelFolder.open(DATA / "llava-tiny-lora")
    shutil.copyfile(DATA / "llava-tiny-lora" / "adapter_config.json", tmp_path / "adapter_config.json")
    with pytest.raises(FileNotFoundError, match=r"has no config.json; it is an adapter"):
        ModelFolder.open(tmp_path)
    (tmp_path / "adapter_config.json").rename(tmp_path / "icons.json")
    with pytest.raises(FileNotFoundError, match=r"has no config.json; it is a warm-up folder: give it as --checkpoint"):
        ModelFolder.open(tmp_path)


def test_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder; expected a model folder"):
        ModelFolder.open(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=re.escape("no projector here; expected mm_projector.bin")):
        ModelFolder.open(DATA / "vicuna-tiny", DATA / "clip", tmp_path)
    (make(tmp_path / "broken", {}) / "config.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape("config.json: not valid JSON")):
        ModelFolder.open(tmp_path / "broken")


def test_refuses_parts_for_a_model_that_has_its_own(tmp_path: Path) -> None:
    model = make(tmp_path / "hf", {"model_type": "llava", "vision_config": CLIP, "text_config": {}})
    with pytest.raises(ValueError, match=r"--vision-tower .* is in the Hugging Face layout and has its own"):
        ModelFolder.open(model, vision_tower=DATA / "clip")
