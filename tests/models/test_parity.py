"""From a data file to gradients: ids, labels, pixels, losses and gradients are those of the original LLaVA code."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from icons.batch import IGNORE_INDEX
from icons.datamodules.datamodule import ConversationDataModule
from icons.gradients import projected_gradients
from icons.gradients.capture import SlowerPathWarning
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.parameter_names import canonical_name
from icons.projection import Identity


def data(original: Path, llava: ModelFolder) -> ConversationDataModule:
    return ConversationDataModule(original / "data.json", original, model_folder=llava)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_ids_labels_and_pixels_equal_the_originals(
    original: Path, llava: ModelFolder, expected: dict[str, Tensor], row: int
) -> None:
    sample = data(original, llava).dataset[row]
    image = sample["input_ids"] == -200
    first = image & ~torch.cat([torch.tensor([False]), image[:-1]])  # the run as one position again
    kept = ~image | first
    assert torch.equal(sample["input_ids"][kept], expected[f"{row}.input_ids"][0])
    assert torch.equal(sample["labels"][kept], expected[f"{row}.labels"][0])
    assert (sample["labels"][image] == IGNORE_INDEX).all()
    assert int(image.sum()) == (0 if row == 1 else llava.image_tokens)
    if row == 1:
        assert "pixel_values" not in sample
    else:
        assert torch.equal(sample["pixel_values"], expected[f"{row}.images"])


@pytest.mark.filterwarnings(f"ignore::{SlowerPathWarning.__module__}.SlowerPathWarning")
@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_losses_and_gradients_equal_the_originals(
    original: Path, llava: ModelFolder, adapter: Path, expected: dict[str, Tensor], rows: list[int]
) -> None:
    dataset = data(original, llava).dataset
    batch = dataset.collate([dataset[row] for row in rows])
    model = load_model(llava, adapter=adapter, target="trainable")
    found = projected_gradients(model, batch, Identity())
    start = 0
    for i, row in enumerate(rows):
        assert abs(found.loss[i].item() - expected[f"{row}.loss"].item()) <= 1e-6
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for i, row in enumerate(rows):
                keys = {
                    canonical_name(key.partition(".grad.")[2]): key
                    for key in expected
                    if key.startswith(f"{row}.grad.")
                }
                wanted = expected[keys[canonical_name(name)]].flatten()
                got = found.gradient[i, start : start + parameter.numel()]
                assert (got - wanted).norm() <= 1e-6 * wanted.norm() + 1e-12, (name, row)
            start += parameter.numel()
    assert start == found.gradient.shape[1]
