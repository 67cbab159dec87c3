"""ConversationDataModule: a data file for warm-up, gradients, validation and fine-tune alike."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Subset

from icons.agreement import IMAGE_FILES
from icons.datamodules.dataset import ConversationDataset
from icons.datamodules.descriptors import check_descriptors
from icons.datamodules.image_marks import Marks, image_marks
from icons.datamodules.preprocessing import Preprocessing
from icons.datamodules.records import open_records
from icons.datamodules.sampler import UnitBatchSampler, unit_dataloader
from icons.datamodules.training import TrainingLoader, TrainingSampler, modality_and_length
from icons.interruption import ignore
from icons.models.folder import ModelFolder
from icons.partition import Partition, UnitPlan


class ConversationDataModule(LightningDataModule):
    """Batches of conversations with images, from data of any form and dialect.

    Args:
        data: a data file, or a `datasets.Dataset`; see `icons.datamodules.records.opening.open_records`.
        images: image folder or archive.
        model_folder: the model that the batches are for.
        preprocessing: template, length and image handling; the same for every stage.
        batch_size: most rows per batch.
        max_tokens: in predict, most tokens per batch, padding included; None: no limit.
        num_workers: processes that read and decode; 0: none beside this one.
        rows: the rows to train on; None: all.
        tasks: validation sets by name: data file and images.
        held_out: rows kept for validation.
        seed: of the order of training.
        trust_remote_code: whether tokenizer and processor may be code of the model's folder.
        dialect: how the records are written; see `icons.datamodules.dialects`. Tasks' files are detected.
        allow_paths: folders beside `images` that the records' absolute paths may lie in.
        web_images: fetch images that the records name by http(s) addresses.

    `plan` is what `predict_dataloader` goes through, given by the writer. Without one it is every row, as one unit.
    """

    def __init__(
        self,
        data: Any,
        images: Path | None = None,
        *,
        model_folder: ModelFolder,
        preprocessing: Preprocessing | None = None,
        batch_size: int = 8,
        max_tokens: int | None = None,
        num_workers: int = 0,
        rows: Sequence[int] | None = None,
        tasks: Mapping[str, tuple[Path, Path | None]] | None = None,
        held_out: Sequence[int] | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
        dialect: str = "auto",
        allow_paths: Sequence[Path] = (),
        web_images: bool = False,
    ) -> None:
        super().__init__()
        check_descriptors(num_workers)
        self.folder, self.allow_paths, self.web_images = model_folder, list(allow_paths), web_images
        self.preprocessing = preprocessing or Preprocessing()
        self.batch_size, self.max_tokens, self.num_workers = batch_size, max_tokens, num_workers
        self.rows, self.tasks, self.held_out, self.seed = rows, dict(tasks or {}), held_out, seed
        self.trust_remote_code = trust_remote_code
        self.dataset = self.make_dataset(data, images, dialect)
        self.preprocessing = self.dataset.preprocessing  # with the template that "auto" has become
        self.plan: UnitPlan | None = None

    def make_dataset(self, data: Any, images: Path | None, dialect: str = "auto") -> ConversationDataset:
        records, folders = open_records(data), (self.allow_paths, self.web_images)
        return ConversationDataset(
            records, images, self.folder, self.preprocessing, self.trust_remote_code, dialect, *folders
        )

    def train_dataloader(self) -> TrainingLoader:
        """Every chosen row once an epoch, shared out to the ranks; remembers its place for a resumed fit."""
        rows = range(len(self.dataset)) if self.rows is None else self.rows
        with_image, words = modality_and_length(partial(self.dataset.conversation, light=True), rows)
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = TrainingSampler(rows, words, with_image, self.batch_size, rank, world_size, self.seed)
        return TrainingLoader(self.dataset, sampler, collate_fn=self.dataset.collate, num_workers=self.num_workers)

    def val_dataloader(self) -> "list[DataLoader[Any]]":
        """One per task, in their order, then the held-out rows."""
        sets: list[Any] = [*self.task_sets.values()]
        if self.held_out is not None:
            sets.append(Subset(self.dataset, list(self.held_out)))
        return [
            DataLoader(
                self.share(part),
                self.batch_size,
                collate_fn=self.dataset.collate,
                num_workers=self.num_workers,
                worker_init_fn=ignore,
            )
            for part in sets
        ]

    def share(self, part: Any) -> Any:
        """This rank's rows of a validation set; under strategies whose ranks must step together, all of them."""
        if self.trainer is None or type(self.trainer.strategy) is not DDPStrategy:
            return part
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return part if len(part) < world_size else Subset(part, range(rank, len(part), world_size))

    def predict_dataloader(self) -> "DataLoader[Any]":
        plan = self.plan or UnitPlan(Partition(len(self.dataset), max(1, len(self.dataset))), [0])
        sampler = UnitBatchSampler(plan, self.dataset.lengths, self.batch_size, self.max_tokens)
        return unit_dataloader(self.dataset, sampler, self.dataset.collate, num_workers=self.num_workers)

    def describe(self) -> dict[str, Any]:
        """The manifest's part: the data file and how it is prepared."""
        return {
            "data": _data_of(self.dataset),
            "preprocessing": self.preprocessing.as_dict(),
            "reader": self.dataset.describe_reader(),
            IMAGE_FILES: self.image_marks,
        }

    @cached_property
    def image_marks(self) -> Marks:
        """What the image files of some rows are known by: of those of a fit, or of all."""
        every = range(len(self.dataset))
        used = every if self.rows is None else sorted({*self.rows, *(self.held_out or ())})
        return _marks(self.dataset, used)

    @cached_property
    def task_sets(self) -> dict[str, ConversationDataset]:
        """The tasks' files, read."""
        return {task: self.make_dataset(*files) for task, files in self.tasks.items()}

    def describe_tasks(self) -> dict[str, dict[str, Any]]:
        """The manifest's part of each task: its file, and what its images are known by."""
        return {
            task: {"data": _data_of(part), IMAGE_FILES: _marks(part, range(len(part)))}
            for task, part in self.task_sets.items()
        }


def _data_of(dataset: ConversationDataset) -> dict[str, Any]:
    records = dataset.records
    return {"path": str(records.path), "num_rows": len(records), "fingerprint": records.fingerprint}


def _marks(dataset: ConversationDataset, rows: Sequence[int]) -> Marks:
    return image_marks(rows, partial(dataset.conversation, light=True), dataset.images)
