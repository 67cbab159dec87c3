"""Where the model of a command comes from, and with which preprocessing."""

from pathlib import Path
from typing import Any

import pytest

from icons.cli import model_source as source
from icons.cli.model_source import ModelSource
from icons.cli.options.groups import CheckpointOptions, PreprocessingOptions
from icons.models.folder import ModelFolder
from icons.models.warmup_folder import WarmupFolder

DATA = Path(__file__).parents[1] / "data" / "original_llava"


@pytest.fixture
def warmup(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A warm-up folder that was trained with the v1 template."""
    model = ModelFolder.open(DATA / "vicuna-tiny", DATA / "clip", DATA / "mm_projector.bin")
    manifest = {"preprocessing": {"template": "v1", "max_length": 99, "preset": "llava-train"}}
    monkeypatch.setattr(source, "open_warmup", lambda folder: WarmupFolder(model, folder, manifest))
    return DATA / "llava-tiny-lora"


def preprocessing(checkpoint: Path, **asked: Any) -> dict[str, Any]:
    return ModelSource.resolve(
        CheckpointOptions(checkpoint=checkpoint), preparing=PreprocessingOptions(**asked)
    ).preprocessing.as_dict()


@pytest.mark.parametrize("template", [None, "auto", "v1"])
def test_the_preprocessing_is_the_warmups(warmup: Path, template: str | None) -> None:
    found = preprocessing(warmup, template=template, max_length=None)
    assert found == {"template": "v1", "max_length": 99, "preset": "llava-train"}


@pytest.mark.parametrize(("name", "value"), [("template", "llama_3"), ("max_length", 100), ("preset", "icons-release")])
def test_another_preprocessing_than_the_warmups_is_refused(warmup: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value}: the warm-up in .* used"):
        preprocessing(warmup, **{name: value})


@pytest.mark.parametrize(("given", "got"), [({}, "neither"), ({"checkpoint": DATA, "model": DATA}, "both")])
def test_one_of_checkpoint_and_model_is_needed(given: dict[str, Path], got: str) -> None:
    with pytest.raises(ValueError, match=f"model: got {got} of --checkpoint and --model"):
        ModelSource.resolve(CheckpointOptions(**given))


@pytest.mark.parametrize("option", ["vision_tower", "mm_projector", "adapter"])
def test_parts_beside_a_warmup_are_refused(warmup: Path, option: str) -> None:
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} .* names its own; leave the option out"):
        parts: dict[str, Any] = {"checkpoint": warmup, option: DATA}
        ModelSource.resolve(CheckpointOptions(**parts))
