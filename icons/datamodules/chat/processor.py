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
from icons.datamodules.chat.templates import TemplateError, Turn, alternating, answer_end, rendered
from icons.datamodules.conversation import IMAGE
from icons.datamodules.failed_row import FailedRowError
from icons.models.folder import own_code


class ProcessorSamples:
    """Turns and images -> ids, labels, and whatever else the model's processor gives.

    The prompt is the processor's chat template; an answer's tokens, its end token among them, are supervised.

    Args:
        folder: the model's folder.
        image_token_id: id at image positions, to see whether the maximal length cuts an image; None: unknown.
        trust_remote_code: whether the processor may be code of the folder's own.
    """

    def __init__(self, folder: Path, image_token_id: int | None, trust_remote_code: bool = False) -> None:
        self.processor = load_processor(folder, trust_remote_code)
        self.tokenizer = self.processor.tokenizer
        self.image_token_id = image_token_id

    def __call__(self, turns: Sequence[Turn], images: Sequence[Image.Image], max_length: int) -> dict[str, Tensor]:
        """`input_ids [L]` and `labels [L]`, per-token inputs `[L]`, and inputs per image with the images first.

        Raises:
            TemplateError: the turns do not alternate, or the chat template rewrites earlier turns.
            FailedRowError: BAD_RECORD, for another number of image marks than images; TOO_LARGE, if the maximal length
                would cut an image, which these models cannot take.
        """
        turns = alternating(turns)
        marks = sum(turn.text.count(IMAGE) for turn in turns)
        if marks > len(images):
            raise FailedRowError(Status.BAD_RECORD, f"{marks} image marks for {len(images)} images")
        images = list(images)[:marks]
        whole = self.prompt(turns)
        inputs = self.process(whole, images)
        ids = inputs.pop("input_ids")[0]
        inputs.pop("attention_mask", None)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for place, turn in enumerate(turns):
            if not turn.human:
                asked = self.prompt(turns[:place], ask=True)
                answered = self.prompt(turns[: place + 1])
                if not (answered.startswith(asked) and whole.startswith(answered)):
                    raise TemplateError("the chat template rewrites earlier turns, so answers cannot be told apart")
                begin = self.position(asked, whole, ids, turns[:place], images)
                end = self.position(answer_end(asked, answered), whole, ids, turns[: place + 1], images)
                labels[begin:end] = ids[begin:end]
        if len(ids) > max_length and images:
            cut = ids[max_length:]
            if self.image_token_id is None or bool((cut == self.image_token_id).any()):
                raise FailedRowError(Status.TOO_LARGE, f"{len(ids)} tokens; the limit of {max_length} cuts an image")
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

    def prompt(self, turns: Sequence[Turn], ask: bool = False) -> str:
        messages = [{"role": "user" if turn.human else "assistant", "content": content(turn.text)} for turn in turns]
        return rendered(self.processor, messages, ask)

    def process(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
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

    def position(
        self, text: str, whole: str, ids: Int[Tensor, " tokens"], turns: Sequence[Turn], images: Sequence[Image.Image]
    ) -> int:
        """Place in `ids` where `text`, the beginning of `whole`, ends."""
        seen = sum(turn.text.count(IMAGE) for turn in turns)
        if seen == len(images):  # no image comes later: count from the end, where nothing is expanded
            before, after = (self.plain(part) for part in (text, whole))
            if after[: len(before)] == before:
                return len(ids) - (len(after) - len(before))
        beginning = self.process(text, images[:seen])["input_ids"][0]
        if not torch.equal(ids[: len(beginning)], beginning):
            raise TemplateError(
                "the tokenizer joins the end of a question with its answer, so they cannot be told apart"
            )
        return len(beginning)

    def plain(self, text: str) -> list[int]:
        """Ids of a text whose images are not expanded."""
        return list(self.tokenizer(text, add_special_tokens=not self.begins(text)).input_ids)


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
                return images_only(folder, trust_remote_code)
        elif isinstance(error, ValueError):
            raise
        raise ValueError(f"{folder}: its processor needs a package that is not installed ({reason})") from None


def images_only(folder: Path, trust_remote_code: bool) -> Any:
    """A processor without its part for videos, which transformers has for torchvision alone."""
    kind: Any = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))]
    processor = type(kind.__name__, (ImagesOnly, kind), {}).from_pretrained(folder)  # type: ignore[attr-defined]
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


def content(text: str) -> list[dict[str, str]]:
    """A turn's text as chat templates take it: images and texts in their order.

    >>> content("<image>\\nWhat?")
    [{'type': 'image'}, {'type': 'text', 'text': '\\nWhat?'}]
    """
    parts: list[dict[str, str]] = []
    for place, part in enumerate(text.split(IMAGE)):
        parts += [{"type": "image"}] * (place > 0)
        if part or IMAGE not in text:
            parts.append({"type": "text", "text": part})
    return parts


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
