"""The rows that `icons gradients` writes against autograd's: in halves, and of a trained tower, checkpointed or not."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from icons.batch import model_inputs, sample_losses
from icons.cli import main
from icons.datamodules.datamodule import ConversationDataModule
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.warmup_folder import open_warmup
from icons.projection import CountSketch
from icons.store import GradientStore

DATA = Path(__file__).parents[1] / "data" / "original_llava"
PARTS = ["--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip", "--mm-projector", DATA / "mm_projector.bin"]
RECORDS = ["--data", DATA / "data.json", "--images", DATA, "--batch-size", 3, "--trainer.accelerator", "cpu"]
ROWS = ["--preconditioner", "none", "--dim", 64, "--dtype", "float32"]
pytestmark = pytest.mark.filterwarnings("ignore")


def gradients(out: Path, *words: object) -> GradientStore:
    assert main(["gradients", *map(str, [*RECORDS, *ROWS, *words, "--out", out])]) == 0
    return GradientStore.open(out)


def one_by_one(folder: ModelFolder, adapter: Path, quantize: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Sketches and norms of one `autograd.grad` per record, each in a batch of its own."""
    model = load_model(folder, adapter=adapter, quantize=quantize, target="lora")
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    shapes = {name: value.shape for name, value in trained.items()}
    data = ConversationDataModule(DATA / "data.json", DATA, model_folder=folder, batch_size=1)
    sketch, rows, norms = CountSketch(64), torch.zeros(3, 64), torch.zeros(3)
    for batch in data.predict_dataloader():
        loss = sample_losses(model(**model_inputs(batch), use_cache=False).logits, batch["labels"]).sum()
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        total, row = sketch.start(1, shapes, torch.device("cpu")), int(batch["row"])
        for (name, value), gradient in zip(trained.items(), found, strict=True):
            block = torch.zeros_like(value)[None] if gradient is None else gradient[None]
            sketch.add(total, name, block * sketch.sign(name, value.shape, block.device))
            norms[row] += block.square().sum()
        rows[row] = total[0]
    return rows.numpy(), norms.sqrt().numpy()


def assert_near(store: GradientStore, expected: tuple[np.ndarray, np.ndarray], tolerance: float) -> None:
    rows, norms = expected
    found = store.gradients[:]
    assert store.status[:].tolist() == [1, 1, 1]
    assert (np.linalg.norm(found - rows, axis=1) < tolerance * np.linalg.norm(rows, axis=1)).all()
    assert (abs(store.norm[:] - norms) < tolerance * norms).all()


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("32-true", 1e-5), ("16-true", 0.005), ("bf16-true", 0.03), ("bf16-mixed", 0.03)],
)
def test_rows_of_every_precision_are_near_those_of_float32(precision: str, tolerance: float, tmp_path: Path) -> None:
    """Within a few units of the last place: 2^-11 of float16, 2^-8 of bfloat16."""
    folder = ModelFolder.open(DATA / "vicuna-tiny", DATA / "clip", DATA / "mm_projector.bin")
    adapter = DATA / "llava-tiny-lora"
    store = gradients(tmp_path / "rows.zarr", *PARTS, "--adapter", adapter, "--trainer.precision", precision)
    assert torch.get_default_dtype() == torch.float32
    assert_near(store, one_by_one(folder, adapter), tolerance)


def test_rows_of_a_trained_tower_are_autograds_with_checkpointed_layers_and_without(tmp_path: Path) -> None:
    out = tmp_path / "warmup"
    more = ["--lora-rank", 2, "--learning-rate", 1e-2, "--epochs", 4, "--fraction", 1, "--min-rows", 1]
    targets = ["--lora-targets", ".*(vision_tower|language_model).*(q_proj|v_proj)$", "--gradient-checkpointing"]
    assert main(["warmup", *map(str, [*PARTS, *RECORDS, *more, *targets, "--out", out])]) == 0
    warm = open_warmup(out)
    expected = one_by_one(warm.model_folder, warm.adapter)
    checkpointing, half = ["--gradient-checkpointing"], ["--trainer.precision", "bf16-mixed"]
    for number, (words, tolerance) in enumerate([([], 1e-5), (checkpointing, 1e-5), (checkpointing + half, 0.03)]):
        store = gradients(tmp_path / f"rows{number}.zarr", "--checkpoint", out, *words)
        assert_near(store, expected, tolerance)


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_rows_of_quantized_base_weights_are_autograds(quantize: Any, tmp_path: Path) -> None:
    """bitsandbytes multiplies in half precision: other batches, other roundings."""
    pytest.importorskip("bitsandbytes", reason="the extra `quantize` is not installed")
    folder = ModelFolder.open(DATA / "vicuna-tiny", DATA / "clip", DATA / "mm_projector.bin")
    adapter = DATA / "llava-tiny-lora"
    store = gradients(tmp_path / "rows.zarr", *PARTS, "--adapter", adapter, "--quantize", quantize)
    assert_near(store, one_by_one(folder, adapter, quantize), 0.03)


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="needs it not to be installed")
def test_a_precision_whose_package_is_missing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *PARTS,
        "--adapter",
        DATA / "llava-tiny-lora",
        *RECORDS,
        *ROWS,
        "--trainer.precision",
        "transformer-engine",
    ]
    words += ["--out", tmp_path / "rows.zarr"]
    assert main(["gradients", *map(str, words)]) == 1
    assert "icons gradients: error: Requirement 'transformer_engine" in capsys.readouterr().err
    assert not (tmp_path / "rows.zarr").exists()
