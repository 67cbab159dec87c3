"""Samples for any Hugging Face image-text model: its own processor writes the prompt and expands the images."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from icons.batch import IGNORE_INDEX, Status
from icons.datamodules.chat.own_template import messages_of
from icons.datamodules.chat.rendering import ChatTemplate, Rendered
from icons.datamodules.chat.skeleton import Message, TemplateError
from icons.datamodules.chat.templates import Turn, alternating
from icons.datamodules.conversation import IMAGE
from icons.datamodules.failed_row import FailedRowError
from icons.models.folder import own_code
from icons.terminal import counted

_SMALLER = ("max_pixels", "max_image_size", "max_patches", "max_dynamic_patch", "size")
# of a single call, or the class's name
_NO_SETTINGS = {
    "return_tensors", "data_format", "input_data_format", "device", "disable_grouping", "image_processor_type",
    "processor_class", "auto_map",
}  # fmt: skip


class ProcessorSamples:
    """Turns and images -> ids, labels, and whatever else the model's processor gives.

    The prompt is the processor's chat template; an answer's tokens, its end token among them, are supervised.

    Args:
        folder: the model's folder.
        image_token_id: id at image positions, to see whether the maximal length cuts an image; None: unknown.
        trust_remote_code: whether the processor may be code of the folder's own.
        options: settings of its image processor, in place of the folder's.

    Raises:
        ValueError: the processor needs what is not there or does not take an option, or its chat template leaves texts
            or images out.
    """

    def __init__(
        self,
        folder: Path,
        image_token_id: int | None,
        trust_remote_code: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.processor = load_processor(folder, trust_remote_code)
        if options:
            self.processor.image_processor = _with_options(self.processor, options, folder)
        self.tokenizer = self.processor.tokenizer
        self.image_token_id = image_token_id
        self.chat = ChatTemplate(self.processor, f"template chat: {folder}", self.image_marks())

    def __call__(
        self, turns: Sequence[Turn], images: Sequence[Image.Image], max_length: int, system: str | None = None
    ) -> dict[str, Tensor]:
        """`input_ids [L]` and `labels [L]`, per-token inputs `[L]`, and inputs per image with the images first.

        Raises:
            TemplateError: the turns do not alternate, or the chat template has no form for them.
            FailedRowError: BAD_RECORD, for another number of image marks than images; TOO_LARGE, if the maximal length
                would cut an image, which these models cannot take.
        """
        messages = messages_of(alternating(turns), bool(images), system)
        marks = sum(not isinstance(part, str) for message in messages for part in message.parts)
        if marks > len(images):
            raise FailedRowError(
                Status.BAD_RECORD, f"{counted(marks, 'image mark')} for {counted(len(images), 'image')}"
            )
        images = list(images)[:marks]
        self.check_texts(messages)
        whole = self.chat(messages)
        if len(whole.images) != marks:
            raise TemplateError(f"the chat template has a place for {len(whole.images)} of {marks} images")
        inputs = self.process(whole.text, images)
        ids = inputs.pop("input_ids")[0]
        inputs.pop("attention_mask", None)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for begin, end in self.positions(whole, ids, images):
            labels[begin:end] = ids[begin:end]
        if len(ids) > max_length and images:
            cut = ids[max_length:]
            if self.image_token_id is None or bool((cut == self.image_token_id).any()):
                raise FailedRowError(
                    Status.TOO_LARGE,
                    f"{len(ids)} tokens; the limit of {max_length} cuts an image: raise --max-length, or let images "
                    f"become fewer tokens{self.smaller()}",
                )
        per_token = {
            name: value[0, :max_length]
            for name, value in inputs.items()
            if value.shape == (1, len(ids)) and value.dtype in (torch.int64, torch.int32, torch.bool)
        }
        return {
            "input_ids": ids[:max_length],
            "labels": labels[:max_length],
            **{name: value for name, value in inputs.items() if name not in per_token},
            **per_token,
        }

    def smaller(self) -> str:
        """How the image processor is told to make less of an image, for messages."""
        name = next((name for name in _SMALLER if name in _settings_of(self.processor.image_processor)), None)
        return f" (--processor.{name})" if name else ""

    def image_marks(self) -> list[str]:
        """What may stand for an image in a prompt, the likeliest first."""
        names = ("image_token", "boi_token", "start_image_token")
        marks = [getattr(owner, name, None) for owner in (self.processor, self.tokenizer) for name in names]
        if self.image_token_id is not None and self.image_token_id < len(self.tokenizer):
            marks.append(self.tokenizer.convert_ids_to_tokens(self.image_token_id))
        return list(dict.fromkeys([*(str(mark) for mark in marks if mark), IMAGE]))

    def check_texts(self, messages: Sequence[Message]) -> None:
        """A text that holds the model's own mark would take an image of its own.

        Raises:
            TemplateError: one does.
        """
        marks = {self.chat.mark, getattr(self.processor, "image_token", None) or self.chat.mark}
        for message in messages:
            for part in message.parts:
                named = [mark for mark in marks if isinstance(part, str) and mark in part]
                if named:
                    raise TemplateError(f"a text holds {named[0]}, the model's mark for an image")

    def process(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The processor's tensors."""
        given: Mapping[str, Any] = self.processor(
            text=[text],
            images=[list(images)] if images else None,
            return_tensors="pt",
            add_special_tokens=not self.begins(text),
        )
        return {name: value for name, value in given.items() if isinstance(value, Tensor)}

    def begins(self, text: str) -> bool:
        """Whether the chat template has written the BOS already."""
        return self.tokenizer.bos_token is None or text.startswith(self.tokenizer.bos_token)

    def positions(
        self, whole: Rendered, ids: Int[Tensor, " tokens"], images: Sequence[Image.Image]
    ) -> list[tuple[int, int]]:
        """Places in `ids` of the answers, whose characters are known.

        After the last image they are counted from the end, where nothing is expanded; before it the text up to there is
        processed apart.
        """
        last = whole.images[-1][1] if whole.images else 0
        known = self.places(whole.text, [span for span in whole.answers if span[0] >= last], ids)
        if known is None:
            known = [self.apart(whole, span, ids, images) for span in whole.answers if span[0] >= last]
        return [self.apart(whole, span, ids, images) for span in whole.answers if span[0] < last] + known

    def places(
        self, text: str, spans: Sequence[tuple[int, int]], ids: Int[Tensor, " tokens"]
    ) -> list[tuple[int, int]] | None:
        """By the characters that each token came from; None where the tokenizer does not tell them."""
        if not spans or not self.tokenizer.is_fast:
            return None if spans else []
        plain = self.tokenizer(text, add_special_tokens=not self.begins(text), return_offsets_mapping=True)
        shift = len(ids) - len(plain.input_ids)
        places = []
        for begin, end in spans:
            inside = [index for index, (first, last) in enumerate(plain.offset_mapping) if first < end and last > begin]
            places.append((inside[0] + shift, inside[-1] + 1 + shift))
        first = places[0][0]
        return places if ids[first:].tolist() == plain.input_ids[first - shift :] else None

    def apart(
        self, whole: Rendered, span: tuple[int, int], ids: Int[Tensor, " tokens"], images: Sequence[Image.Image]
    ) -> tuple[int, int]:
        """By what the text up to the answer, and up to its end, becomes.

        Raises:
            TemplateError: that is not the beginning of `ids`.
        """
        ends = []
        for index in span:
            seen = sum(end <= index for _, end in whole.images)
            beginning = self.process(whole.text[:index], images[:seen])["input_ids"][0]
            if not torch.equal(ids[: len(beginning)], beginning):
                raise TemplateError(
                    "the tokenizer joins the end of a question with its answer, so they cannot be told apart"
                )
            ends.append(len(beginning))
        return ends[0], ends[1]


def load_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's processor. One that reads videos too is loaded without that part where torchvision is missing.

    Raises:
        ValueError: it needs a package that is not installed, or code of the folder's own.

    Warns:
        UserWarning: the part for videos is left out.
    """
    try:
        with own_code(folder):
            return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        if "torchvision" in reason.lower():
            with suppress(ImportError, ValueError, TypeError, KeyError):
                return _images_only(folder, trust_remote_code)
        elif isinstance(error, ValueError):
            raise
        raise ValueError(f"{folder}: its processor needs a package that is not installed ({reason})") from None


def _with_options(processor: Any, options: Mapping[str, Any], folder: Path) -> Any:
    """The image processor of `processor` with other settings.

    Raises:
        ValueError: it has no such setting, or does not take the value.
    """
    former = processor.image_processor
    known = _settings_of(former)
    asked = ", ".join(f"{name} {value}" for name, value in options.items())
    if strange := sorted(set(options) - known):
        raise ValueError(
            f"--processor.{strange[0]}: {type(former).__name__} of {folder} has no such setting; expected one of "
            f"{', '.join(sorted(known))}"
        )
    try:
        made = former.from_dict(former.to_dict(), **options)
        made(images=[Image.new("RGB", (64, 64))], return_tensors="pt")  # many a value is looked at only now
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--processor: {type(former).__name__} of {folder} does not take {asked}: {reason}") from None
    return made


def _settings_of(image_processor: Any) -> set[str]:
    """Names of what may be set of an image processor."""
    documented = getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", {})
    own = {name for name in image_processor.to_dict() if not name.startswith("_")}
    return (set(documented) | own) - _NO_SETTINGS


def _images_only(folder: Path, trust_remote_code: bool) -> Any:
    """A processor without its part for videos, which transformers has for torchvision alone."""
    kind: Any = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))]
    made: Any = type(kind.__name__, (ImagesOnly, kind), {})
    processor = made.from_pretrained(folder, trust_remote_code=trust_remote_code)
    warnings.warn(
        f"{folder}: {kind.__name__} works without its part for videos, and on images with pillow: torchvision is not "
        "installed; install it, or leave it out, for all stages alike: its pixel values differ a little",
        UserWarning,
        stacklevel=2,
    )
    return processor


class ImagesOnly:
    """Put before a processor's class: its parts are those of the class, but for videos."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]  # type: ignore[misc]


def join(parts: Sequence[Tensor]) -> Tensor:
    """One after the other along the first dimension; where other dimensions differ, zeros fill up to the largest.

    >>> join([torch.ones(1, 2), torch.ones(1, 1)]).tolist()
    [[1.0, 1.0], [1.0, 0.0]]
    """
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [(0, size - have) for size, have in zip(largest, part.shape[1:], strict=True)]
        padded.append(F.pad(part, [side for pair in reversed(missing) for side in pair]))
    return torch.cat(padded)
