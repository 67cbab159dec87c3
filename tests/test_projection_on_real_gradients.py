"""The count sketch on gradients of a real model: the demo's start, its LoRA and easy-VQA's questions and images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import icons
from icons.datamodules.datamodule import ConversationDataModule
from icons.datamodules.easy_vqa import make_demo_data
from icons.gradients import per_sample_gradients
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.lora import LoraSettings
from icons.projection import CountSketch

START = Path(icons.__file__).parent / "configs" / "demo_start"
DIM, SEEDS = 512, 400
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Size], Tensor]:
    """Names and shapes of the parameters, and the gradients of eight samples after a moment's training."""
    data = make_demo_data(tmp_path_factory.mktemp("demo"), num_pool=20, num_validation=4, num_test=4)
    records = [record for record in json.loads(data.pool.read_text()) if "image" in record][:8]
    few = data.pool.with_name("few.json")
    few.write_text(json.dumps(records))
    folder = ModelFolder.open(START)
    torch.manual_seed(0)
    model = load_model(folder, lora=LoraSettings(rank=8))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.01 * torch.randn(parameter.shape, generator=generator)
    module = ConversationDataModule(few, data.pool.parent / "images", model_folder=folder)
    batch = module.dataset.collate([module.dataset[row] for row in range(len(records))])
    assert len(batch["labels"]) == 8
    return shapes(model), per_sample_gradients(model, batch)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.named_parameters() if value.requires_grad}


def with_outlier_features(layout: dict[str, torch.Size], rows: Tensor) -> Tensor:
    """The same gradients with four input features 30 times as large, the same in every row of every weight."""
    pieces = []
    for shape, block in zip(layout.values(), rows.split([s.numel() for s in layout.values()], dim=1), strict=True):
        weight = block.reshape(-1, *shape).clone()
        if shape[-1] > 40:
            weight[..., [3, 17, 30, 39]] *= 30
        pieces.append(weight.flatten(1))
    return torch.cat(pieces, dim=1)


def project(projector: Any, layout: dict[str, torch.Size], rows: Tensor) -> Tensor:
    total = projector.start(len(rows), layout, rows.device)
    for (name, shape), block in zip(layout.items(), rows.split([s.numel() for s in layout.values()], 1), strict=True):
        block = block.reshape(-1, *shape)
        sign = projector.sign(name, shape, block.device)
        projector.add(total, name, block if sign is None else block * sign)
    return total


def relative_variance(layout: dict[str, torch.Size], rows: Tensor, seeds: int) -> float:
    """Mean squared error of all pairs' inner products, in units of (|a|^2 |b|^2 + <a, b>^2) / K."""
    rows = nn.functional.normalize(rows, dim=1)
    one, two = torch.triu_indices(len(rows), len(rows), 1)
    exact = (rows @ rows.mT)[one, two]
    errors = []
    for seed in range(seeds):
        found = project(CountSketch(DIM, seed), layout, rows)
        errors.append(((found @ found.mT)[one, two] - exact).square() / ((1 + exact.square()) / DIM))
    return float(torch.stack(errors).mean())


@pytest.mark.slow
@pytest.mark.parametrize("outliers", [False, True])
def test_variance_on_real_gradients_is_within_10_percent_of_dense_signs(
    outliers: bool, real: tuple[dict[str, torch.Size], Tensor]
) -> None:
    layout, rows = real
    if outliers:
        rows = with_outlier_features(layout, rows)
    assert relative_variance(layout, rows, SEEDS) < 1.1
