"""A fine-tune as `icons warmup` makes it, to the last bit, in two thirds of the time: for studies with many of them.

Every image goes through the frozen vision tower once per process, samples are kept, and nothing is measured before
training. Measured besides: how many of the yes-or-no questions are answered yes.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from icons.batch import Batch, model_inputs, sample_losses, supervised_tokens
from icons.cli.demo import DemoSettings
from icons.datamodules.chat.template_samples import TemplateSamples
from icons.datamodules.datamodule import ConversationDataModule
from icons.datamodules.dataset import ConversationDataset
from icons.datamodules.easy_vqa import DemoData
from icons.datamodules.images import ImageSource
from icons.datamodules.pixels import PixelMaker
from icons.datamodules.records import RecordIndex
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.lora import LoraSettings
from icons.modules.fit import quiet, trainer_flags
from icons.modules.fit_checkpoint import FitCheckpoint
from icons.modules.warmup import WarmupModule, exact_matches

TRAINER: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False}
DROPOUT = 0.05
"""Of the adapter: the default of `icons warmup`."""


def fine_tune(folder: Path, pool: DemoData, rows: np.ndarray, seed: int, options: DemoSettings) -> dict[str, Any]:
    """Accuracy and loss of each task after `icons warmup` on these rows with this seed."""
    start = ModelFolder.open(folder / "start")
    lora = LoraSettings(options.lora_rank, 2.0 * options.lora_rank, DROPOUT, None, seed)
    data = KnownData(
        pool.pool, pool.images, model_folder=start, batch_size=options.batch_size, rows=rows.tolist(), seed=seed,
        tasks={task: (file, pool.images) for task, file in pool.test.items()},
    )  # fmt: skip
    network = load_model(start, lora=lora, target="trainable")
    network.base_model.model.image_features = lambda features: features  # type: ignore[union-attr]
    module = Measured(
        network, learning_rate=options.learning_rate, projector_learning_rate=options.projector_learning_rate,
        tasks=list(pool.test),
    )  # fmt: skip
    module.yes_no = (answer_token(data.dataset, "yes"), answer_token(data.dataset, "no"))
    flags = trainer_flags(TRAINER, options.epochs, 1, "float32") | {"num_sanity_val_steps": 0}
    with quiet():
        flags["callbacks"] = [FitCheckpoint(folder / "fit", 1e9, seed)]
        Trainer(**flags).fit(module, datamodule=data)
    said, right, asked = module.counts.tolist()
    return {
        "accuracy": {task: found["accuracy"] for task, found in module.after.items()},
        "loss": {task: found["loss"] for task, found in module.after.items()},
        "said_yes": said / asked, "right_yes": right / asked,
    }  # fmt: skip


def answer_token(data: ConversationDataset, answer: str) -> int:
    """The first token of an answer, as the data's template has it."""
    row = next(row for row in range(len(data)) if data.records[row]["conversations"][1]["value"] == answer)
    labels = data[row]["labels"]
    return int(labels[labels >= 0][0])


class Features(ImageSource):
    """Image name -> what the frozen vision tower makes of it, once."""

    def __init__(self, images: Path, folder: ModelFolder, pad: bool) -> None:
        super().__init__(images)
        self.pixels, self.model = PixelMaker(folder.model, pad), load_model(folder)
        self.known: dict[str, Tensor] = {}

    def open(self, name: str) -> Any:
        if name not in self.known:
            with torch.no_grad():
                self.known[name] = self.model.image_features(self.pixels([super().open(name)]))
        return self.known[name]


class KnownSamples(ConversationDataset):
    """A data set that keeps its samples, with image features in place of pixels."""

    def use(self, features: Features) -> "KnownSamples":
        assert isinstance(self.maker, TemplateSamples)
        self.images, self.maker.pixels, self.kept = features, torch.cat, {}
        return self

    def __getitem__(self, row: int) -> dict[str, Any]:
        if row not in self.kept:
            self.kept[row] = super().__getitem__(row)
        return self.kept[row]


class KnownData(ConversationDataModule):
    """A data module whose data sets are opened once per process."""

    def make_dataset(self, data: Path, images: Path | None, dialect: str = "auto") -> ConversationDataset:
        assert images is not None
        return known_samples(data, images, self.folder, self.preprocessing)


@lru_cache(maxsize=64)
def known_samples(data: Path, images: Path, folder: ModelFolder, preprocessing: Any) -> KnownSamples:
    records = RecordIndex(data)
    return KnownSamples(records, images, folder, preprocessing).use(known_features(images, folder, preprocessing.pad))


@lru_cache(maxsize=24)
def known_features(images: Path, folder: ModelFolder, pad: bool) -> Features:
    return Features(images, folder, pad)


class Measured(WarmupModule):
    """Also counts, among the yes-or-no questions, how many are answered yes, and how many should be."""

    yes_no: tuple[int, int]
    counts: Tensor

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.counts = torch.zeros(3)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits, labels = self.model(**model_inputs(batch), use_cache=False).logits, batch["labels"]
        assert (supervised_tokens(labels) > 0).all()
        matches = exact_matches(logits, labels)
        self.sums[dataloader_idx] += torch.stack(
            [sample_losses(logits, labels).sum(), matches.sum(), torch.tensor(len(labels))]
        ).float()
        first = (labels[:, 1:] >= 0).int().argmax(dim=1)
        each = torch.arange(len(labels))
        said, right = logits[each, first].argmax(dim=-1), labels[each, first + 1]
        asked = torch.isin(right, torch.tensor(self.yes_no))
        yes = self.yes_no[0]
        self.counts += torch.stack([(said == yes)[asked].sum(), (right == yes).sum(), asked.sum()])
