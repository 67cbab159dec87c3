"""The check of all architectures tells right rows from wrong ones."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

SCRIPTS = Path(__file__).parents[2] / "scripts"
pytestmark = pytest.mark.filterwarnings("ignore")


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.logging, "set_verbosity_error", lambda: None)  # it is the process's
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return loaded("check_models", monkeypatch)


def test_rows_are_right_and_an_architecture_that_cannot_be_made_small_is_named(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["qwen2", "blt", "--train", "lora", "--dtypes", "float32", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "cannot   blt                      lora  float32   ValueError: it has" in said
    assert said.endswith("2 cannot, 2 right\n")


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1.001), ("bfloat16", 1.05)])
def test_a_wrong_row_is_found(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str, share: float
) -> None:
    gradients = script.per_sample_gradients

    def one_is_wrong(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return gradients(model, batch) * torch.tensor([[1], [share], [1]])

    monkeypatch.setattr(script, "per_sample_gradients", one_is_wrong)
    assert script.main(["qwen2", "--train", "lora", "--dtypes", dtype]) == 1
    assert capsys.readouterr().out.startswith(f"wrong    qwen2                    lora  {dtype}")


def test_rows_with_images_are_right_and_a_model_that_takes_no_such_pixels_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "check_models", loaded("check_models", monkeypatch))  # which it reads
    script = loaded("check_image_text_models", monkeypatch)
    assert script.main(["internvl", "blip", "--train", "lora", "--dtypes", "float32"]) == 0
    said = capsys.readouterr().out
    assert "cannot   blip                     ValueError: images 16: AttributeError" in said
    assert said.endswith("1 not made or not run, 1 right\n")
