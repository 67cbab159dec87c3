"""ConversationDataset: a record -> tokens, labels and pixels; a batch of them -> tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from transformers import CLIPImageProcessorPil

from icons.batch import IGNORE_INDEX, Status
from icons.datamodules.preprocessing import Preprocessing
from icons.datamodules.records import RecordIndex
from icons.datamodules.templates import IMAGE_PLACE, TEMPLATES, TemplateError, Turn, put_image_first
from icons.datamodules.tokenizer import load_tokenizer
from icons.model_folder import ModelFolder

HUMAN = {"human": True, "gpt": False}


class FailedRowError(Exception):
    """A record that cannot become a sample, and why."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ConversationDataset(Dataset[dict[str, Any]]):
    """Samples of a data file by row."""

    def __init__(
        self, records: RecordIndex, images: Path | None, folder: ModelFolder, preprocessing: Preprocessing
    ) -> None:
        self.records, self.images, self.folder, self.preprocessing = records, images, folder, preprocessing
        self.tokenizer = load_tokenizer(folder.model)
        name = folder.template if preprocessing.template == "auto" else preprocessing.template
        if name not in TEMPLATES:
            raise ValueError(f"template {name!r}; expected auto or one of {', '.join(TEMPLATES)}")
        self.template = TEMPLATES[name]
        self.processor = (
            CLIPImageProcessorPil.from_pretrained(folder.vision_tower or folder.model) if folder.image_tokens else None
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            return self.sample(row)
        except FailedRowError as failure:
            return {"row": row, "failed": failure.status}

    def lengths(self, rows: Sequence[int]) -> list[int]:
        found = []
        for row in rows:
            try:
                found.append(len(self.tokens(self.record(row))[0]))
            except FailedRowError:
                found.append(0)
        return found

    def record(self, row: int) -> Mapping[str, Any]:
        try:
            record = self.records[row]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FailedRowError(Status.BAD_RECORD, f"not valid JSON: {error}") from None
        if (
            not isinstance(record, dict)
            or not isinstance(record.get("conversations"), list)
            or not record["conversations"]
        ):
            raise FailedRowError(Status.BAD_RECORD, "no conversations")
        return record

    def has_image(self, record: Mapping[str, Any]) -> bool:
        return "image" in record and str(record["image"]) not in ("", "None", "none", "nan")

    def tokens(self, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids and labels, images expanded to one position per feature, cut as LLaVA cuts: before and after."""
        image = self.has_image(record)
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
        record = self.record(row)
        ids, labels = self.tokens(record)
        if all(label == IGNORE_INDEX for label in labels[1:]):
            raise FailedRowError(Status.NO_SUPERVISED_TOKEN, "no supervised token")
        sample: dict[str, Any] = {"row": row, "input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        if self.has_image(record) and self.folder.image_token_id in ids:
            sample["pixel_values"] = self.pixels(record["image"])
        return sample

    def pixels(self, name: str) -> torch.Tensor:
        if self.images is None:
            raise FailedRowError(Status.IMAGE_MISSING, "no image folder")
        path = (self.images / name).resolve()
        if not path.is_relative_to(self.images.resolve()) or not path.is_file():
            raise FailedRowError(Status.IMAGE_MISSING, f"no image {name}")
        assert self.processor is not None
        try:
            image = Image.open(path).convert("RGB")
        except (UnidentifiedImageError, OSError, ValueError) as error:
            raise FailedRowError(Status.IMAGE_BROKEN, str(error)) from None
        if self.preprocessing.pad and image.width != image.height:
            side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in self.processor.image_mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        return self.processor(image, return_tensors="pt")["pixel_values"]

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
