"""ConversationDataset: a record -> tokens, labels and pixels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from icons.batch import IGNORE_INDEX, Status
from icons.datamodules.chat.processor import ProcessorSamples
from icons.datamodules.chat.reader import describe_reader
from icons.datamodules.chat.skeleton import TemplateError
from icons.datamodules.chat.template_samples import TemplateSamples
from icons.datamodules.chat.templates import NAMES, Turn, put_image_first
from icons.datamodules.collation import collated
from icons.datamodules.conversation import Conversation
from icons.datamodules.dialects import Dialect, detect, dialect_named, read_conversation
from icons.datamodules.failed_row import FailedRowError, bad_record
from icons.datamodules.images import ImageSource
from icons.datamodules.preprocessing import Preprocessing
from icons.datamodules.records import RecordError, RecordSource
from icons.models.folder import ModelFolder
from icons.terminal import counted

_LOOKED_AT = 32
_DETECTED_BY = 64  # records, evenly spaced over the file
_KEPT_TOKENS = 1 << 20  # of measured rows, until they are asked for: 16 MB


class ConversationDataset(Dataset[dict[str, Any]]):
    """Samples of a data file by row; a record that cannot become one keeps its row and says why.

    `dataset[row]` is `{"row", "input_ids", "labels"}` with `pixel_values` or whatever else the model's own processor
    gives, or `{"row", "failed": Status, "reason": sentence, "id"}`. Whatever a record makes a processor or a template
    raise is that row's failure.

    Args:
        records: the data file.
        images: image folder or archive.
        folder: the model that the samples are for: its tokenizer, and how many positions an image takes.
        preprocessing: template, length and image handling; the attribute of this name has the template that "auto" is.
        trust_remote_code: whether tokenizer and processor may be code of the model's folder.
        dialect: how the records are written (`icons.datamodules.dialects`); "auto": as most of 64 of them are. The
            attribute of this name is the one that it has become.

        allow_paths: folders beside `images` that the records' absolute paths may lie in.
        web_images: fetch images that the records name by http(s) addresses.

    Raises:
        ValueError: the file holds no record, or none that is a conversation; the dialect is unknown; the template is
            unknown, not the one that the model's processor has, or chat where there is none.
    """

    def __init__(
        self,
        records: RecordSource,
        images: Path | None,
        folder: ModelFolder,
        preprocessing: Preprocessing,
        trust_remote_code: bool = False,
        dialect: str = "auto",
        allow_paths: Sequence[Path] = (),
        web_images: bool = False,
    ) -> None:
        self.made_of = (records, images, folder, preprocessing, trust_remote_code)
        self.folders = (tuple(allow_paths), web_images)
        asked = dialect_named(dialect)
        if not len(records):
            raise ValueError(f"{records.path}: holds no record; expected LLaVA JSON or JSONL with one at least")
        name = folder.template if preprocessing.template == "auto" else preprocessing.template
        self.records, self.folder, self.preprocessing = records, folder, replace(preprocessing, template=name)
        self.images = ImageSource(images, allow_paths, web_images)
        if not name:
            raise ValueError(
                f"template auto: nothing in {folder.model} tells which conversation template the model was trained "
                "with (it brings no chat template, and its tokenizer is neither Llama's nor Llama 3's); expected a "
                f"--template: name it ({', '.join(NAMES)})"
            )
        if name not in NAMES:
            raise ValueError(f"template {name!r}; expected auto or one of {', '.join(NAMES)}")
        self.maker: ProcessorSamples | TemplateSamples
        if folder.kind == "image-text":
            if name != "chat":
                raise ValueError(
                    f"template {name!r}: {folder.model} has a processor of its own; expected chat (or auto), "
                    "the template that the processor brings"
                )
            self.maker = ProcessorSamples(
                folder.model, folder.image_token_id, trust_remote_code, preprocessing.processor
            )
        elif preprocessing.processor:
            raise ValueError(
                f"--processor {preprocessing.processor}: {folder.model} is a {folder.kind} model, and its images, if "
                "any, have one size; expected an image-text model with a processor of its own: leave the option out"
            )
        else:
            self.maker = TemplateSamples(folder, self.preprocessing, trust_remote_code)
        self.tokenizer = self.maker.tokenizer
        self.measured: dict[int, Sequence[Tensor]] = {}  # row -> ids and labels
        self.dialect = asked or self.detected()

    def describe_reader(self) -> dict[str, str | None]:
        """What of the model's folder decides how a record is read, for manifests."""
        own = self.maker.chat
        return describe_reader(self.folder.model, self.folder.image_processor, own.template if own else None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to a worker process as its arguments and is made anew there: processors and templates hold what
        cannot travel, under start methods other than fork."""
        return type(self), (*self.made_of, self.dialect.name, *self.folders)

    def __len__(self) -> int:
        return len(self.records)

    def summary(self) -> str:
        """One line: what the data are, and in which dialect."""
        return f"{self.records.path}: {counted(len(self), 'row')}, dialect {self.dialect.name} ({self.dialect.expects})"

    def check_some(self, rows: Sequence[int]) -> None:
        """Looks at up to 32 of the rows, so that a wrong image folder shows before a model is loaded.

        Raises:
            ValueError: each of them fails; says why the first does.
        """
        looked_at = rows[:: max(1, len(rows) // _LOOKED_AT)][:_LOOKED_AT]
        first = None
        for row in looked_at:
            sample = self[row]
            if "failed" not in sample:
                return
            first = first or sample
        if first is not None:
            raise ValueError(
                f"{self.records.path}: each row looked at ({len(looked_at)}) fails; the first, row "
                f"{first['row']}: {first['reason']}; expected one at least that can be used"
            )

    def detected(self) -> Dialect:
        """The dialect of the records."""
        rows = range(0, len(self), max(1, len(self) // _DETECTED_BY))
        records = []
        for row in rows[:_DETECTED_BY]:
            with suppress(RecordError):
                records.append(self.records.light(row))
        try:
            return detect(records)
        except ValueError as error:
            raise ValueError(f"{self.records.path}: {error}") from None

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            return self.sample(row)
        except FailedRowError as failure:
            return {"row": row, "failed": failure.status, "reason": str(failure), "id": self.records.id(row)}

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens of each row as the model will see them; 0 for one that fails.

        Images are not opened, but for models whose own processor decides how many tokens an image is. The tokens of
        these rows are kept until they are asked for, a million at most, so that a text is not tokenised twice.
        """
        lengths: list[int] = []
        self.measured, kept = {}, 0
        for row in rows:
            try:
                if isinstance(self.maker, ProcessorSamples):
                    lengths.append(len(self.sample(row)["input_ids"]))
                else:
                    with _row_failure():
                        said = self.conversation(row, light=True)
                        tokens = self.maker.tokens(self.turns(said), bool(said.images), said.system)
                    lengths.append(len(tokens[0]))
                    if kept + lengths[-1] <= _KEPT_TOKENS:
                        self.measured[row], kept = [*map(torch.tensor, tokens)], kept + lengths[-1]
            except FailedRowError:
                lengths.append(0)
        return lengths

    def conversation(self, row: int, light: bool = False) -> Conversation:
        """What the record says.

        Args:
            row: which.
            light: leave the contents of embedded images out.

        Raises:
            FailedRowError: the record cannot be read, or is no conversation in the file's dialect.
        """
        try:
            record = self.records.light(row) if light else self.records[row]
        except RecordError as error:
            raise FailedRowError(Status.BAD_RECORD, f"the record cannot be read: {error}") from None
        return read_conversation(record, self.dialect)

    def turns(self, conversation: Conversation) -> list[Turn]:
        """The conversation's turns from its first question on, image marks in front where the preset says so.

        Raises:
            FailedRowError: an image stands before the first question.
        """
        spoken = conversation.turns
        if not spoken[0].human:  # what no template trains on
            if spoken[0].images:
                raise bad_record("has an image in an answer before the first question")
            spoken = spoken[1:]
        images = len(conversation.images)
        if images and self.preprocessing.reorder:
            return [Turn(turn.human, put_image_first(turn.text, several=images > 1)) for turn in spoken]
        return [Turn(turn.human, turn.text) for turn in spoken]

    def sample(self, row: int) -> dict[str, Any]:
        """Ids, labels and pixels of one record.

        Raises:
            FailedRowError: see `Status`.
        """
        with _row_failure():
            said = self.conversation(row)
            turns, opened = self.turns(said), partial(self.opened, said)
            if isinstance(self.maker, ProcessorSamples):
                sample = self.maker(turns, opened(), self.preprocessing.max_length, said.system)
            else:
                sample = self.maker(turns, bool(said.images), said.system, opened, self.measured.pop(row, None))
        if not bool((sample["labels"][1:] != IGNORE_INDEX).any()):
            raise FailedRowError(Status.NO_SUPERVISED_TOKEN, "no token of an answer is left to train on")
        return {"row": row, **sample}

    def opened(self, conversation: Conversation) -> list[Image.Image]:
        return [self.images.open(image) for image in conversation.images]

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch as `icons.batch` describes it; `pixel_values [images, 3, H, W]` in the order of rows and marks."""
        return collated(samples, self.tokenizer.pad_token_id or 0)


@contextmanager
def _row_failure() -> Iterator[None]:
    """Whatever a record makes a template, a tokenizer or a processor raise is the failure of its row.

    Raises:
        FailedRowError: in place of any other error; but what is wrong with the machine (memory, files) stays as it is.
    """
    try:
        yield
    except (FailedRowError, MemoryError, OSError):
        raise
    except TemplateError as error:
        raise FailedRowError(Status.BAD_RECORD, str(error)) from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FailedRowError(Status.BAD_RECORD, f"the record cannot be prepared: {reason}") from error
