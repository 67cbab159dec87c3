"""ConversationDataset: a record -> tokens, labels and pixels; a batch of them -> tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.utils.data import Dataset

from icons.batch import IGNORE_INDEX, Status
from icons.datamodules.images import FailedRowError, ImageSource, PixelMaker, names_of
from icons.datamodules.preprocessing import Preprocessing
from icons.datamodules.records import RecordIndex
from icons.datamodules.templates import IMAGE_PLACE, TEMPLATES, TemplateError, Turn, put_image_first
from icons.datamodules.tokenizer import load_tokenizer
from icons.model_folder import ModelFolder

HUMAN = {"human": True, "user": True, "gpt": False, "assistant": False}


class ConversationDataset(Dataset[dict[str, Any]]):
    """Samples of a data file by row; a record that cannot become one keeps its row and says why.

    `dataset[row]` is `{"row", "input_ids", "labels"[, "pixel_values"]}`, or `{"row", "failed": Status}`.

    Args:
        records: the data file.
        images: image folder or archive.
        folder: the model that the samples are for: its tokenizer, and how many positions an image takes.
        preprocessing: template, length and image handling.

    Raises:
        ValueError: the template is unknown.
    """

    def __init__(
        self, records: RecordIndex, images: Path | None, folder: ModelFolder, preprocessing: Preprocessing
    ) -> None:
        self.records, self.folder, self.preprocessing = records, folder, preprocessing
        self.images = ImageSource(images)
        self.tokenizer = load_tokenizer(folder.model)
        name = folder.template if preprocessing.template == "auto" else preprocessing.template
        if name not in TEMPLATES:
            raise ValueError(f"template {name!r}; expected auto or one of {', '.join(TEMPLATES)}")
        self.template = TEMPLATES[name]
        self.pixels = (
            PixelMaker(folder.vision_tower or folder.model, preprocessing.pad) if folder.image_tokens else None
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            return self.sample(row)
        except FailedRowError as failure:
            return {"row": row, "failed": failure.status}

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens of each row as the model will see them; 0 for one that fails."""
        found = []
        for row in rows:
            try:
                found.append(len(self.tokens(self.record(row))[0]))
            except FailedRowError:
                found.append(0)
        return found

    def record(self, row: int) -> Mapping[str, Any]:
        """The record, checked to be a conversation.

        Raises:
            FailedRowError: not JSON, no object, or without conversations.
        """
        try:
            record = self.records[row]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FailedRowError(Status.BAD_RECORD, f"not valid JSON: {error}") from None
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not turns:
            raise FailedRowError(Status.BAD_RECORD, "no conversations")
        return record  # type: ignore[no-any-return]

    def tokens(self, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids and labels, images expanded to one position per feature, cut as LLaVA cuts: before and after."""
        image = bool(names_of(record.get("image")))
        try:
            turns = [Turn(HUMAN[turn["from"]], turn["value"]) for turn in record["conversations"]]
            if image and self.preprocessing.reorder:
                turns = [Turn(turn.human, put_image_first(turn.text)) for turn in turns]
            ids, labels = self.template(self.tokenizer, turns, image, self.preprocessing.max_length)
        except TemplateError as error:
            raise FailedRowError(Status.BAD_RECORD, str(error)) from None
        except (KeyError, TypeError, AttributeError):
            raise FailedRowError(Status.BAD_RECORD, "a turn without `from` (human or gpt) and `value`") from None
        limit = self.preprocessing.max_length
        return self.expand(ids[:limit], labels[:limit])

    def expand(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        if IMAGE_PLACE not in ids:
            return ids, labels
        if self.folder.image_token_id is None:
            raise FailedRowError(Status.BAD_RECORD, "the record has an image and the model takes none")
        count, limit = self.folder.image_tokens, self.preprocessing.max_length
        wide: list[int] = []
        marked: list[int] = []
        for token, label in zip(ids, labels, strict=True):
            if token == IMAGE_PLACE:
                wide += [self.folder.image_token_id] * count
                marked += [IGNORE_INDEX] * count
            else:
                wide.append(token)
                marked.append(label)
        return wide[:limit], marked[:limit]

    def sample(self, row: int) -> dict[str, Any]:
        """Ids, labels and pixels of one record.

        Raises:
            FailedRowError: see `Status`.
        """
        record = self.record(row)
        ids, labels = self.tokens(record)
        if all(label == IGNORE_INDEX for label in labels[1:]):
            raise FailedRowError(Status.NO_SUPERVISED_TOKEN, "no supervised token")
        sample: dict[str, Any] = {"row": row, "input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        names = names_of(record.get("image"))
        if names and self.pixels is not None:
            positions = ids.count(self.folder.image_token_id)  # type: ignore[arg-type]
            needed = -(-positions // self.folder.image_tokens)  # images that the maximal length cuts away are not
            if needed > len(names):
                raise FailedRowError(Status.BAD_RECORD, f"{needed} image marks for {len(names)} images")
            opened = [self.images.open(name) for name in names]  # also unused ones: a broken record is a broken record
            if needed:
                sample["pixel_values"] = self.pixels(opened[:needed])
        return sample

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch as `icons.batch` describes it; `pixel_values [images, 3, H, W]` in the order of rows and marks."""
        good = [sample for sample in samples if "failed" not in sample]
        failed = [sample for sample in samples if "failed" in sample]
        length = max((len(sample["input_ids"]) for sample in good), default=0)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(good), length), pad)
        mask = torch.zeros(len(good), length, dtype=torch.int64)
        labels = torch.full((len(good), length), IGNORE_INDEX)
        for place, sample in enumerate(good):
            size = len(sample["input_ids"])
            ids[place, :size], labels[place, :size], mask[place, :size] = sample["input_ids"], sample["labels"], 1
        batch: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "row": torch.tensor([sample["row"] for sample in good], dtype=torch.int64),
            "failed_row": torch.tensor([sample["row"] for sample in failed], dtype=torch.int64),
            "failed_status": torch.tensor([int(sample["failed"]) for sample in failed], dtype=torch.uint8),
        }
        pixels = [sample["pixel_values"] for sample in good if "pixel_values" in sample]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        return batch
