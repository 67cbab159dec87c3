"""Where a record's images and its system text stand among its turns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from icons.datamodules.conversation import IMAGE, ImageRef, Part, Turn, marked
from icons.datamodules.failed_row import bad_record
from icons.datamodules.image_refs import given
from icons.terminal import counted


@dataclass
class Message:
    """A turn before its images are known: texts, images, and None for an image of the record's `images`."""

    role: str
    parts: list[Part | None] = field(default_factory=list)


def system_of(own: Any, messages: list[Message]) -> tuple[str | None, list[Message]]:
    """The system text, from its field or the first message, and the messages without it."""
    text = own if given(own) else None
    if text is not None and not isinstance(text, str):
        raise bad_record(f"has a `system` of {type(own).__name__}; expected a text")
    if messages and messages[0].role == "system":
        first = "".join(part for part in messages[0].parts if isinstance(part, str))
        if len(first) != sum(len(part) if isinstance(part, str) else 1 for part in messages[0].parts):
            raise bad_record("has an image in its system turn")
        if text is not None and text != first:
            raise bad_record("has a `system` field and another system turn")
        text, messages = first, messages[1:]
    if any(message.role == "system" for message in messages):
        raise bad_record("has a system turn after the first; expected it in front")
    return text, messages


def placed(messages: Sequence[Message], images: list[ImageRef]) -> Iterator[Turn]:
    """The turns, each image at its place."""
    places = sum(part is None for message in messages for part in message.parts)
    own = any(isinstance(part, ImageRef) for message in messages for part in message.parts)
    marks = [sum(part.count(IMAGE) for part in message.parts if isinstance(part, str)) for message in messages]
    if places or own:
        if sum(marks):
            raise bad_record("has both <image> marks and parts of type image; expected one or the other")
        if places != len(images):
            raise bad_record(f"has {counted(places, 'image part')} for {counted(len(images), 'image')}")
    elif images and not sum(marks):
        first = next((message for message in messages if message.role == "user"), None)
        if first is None:
            raise bad_record("has images and no question")
        first.parts[:0] = images
        images = []
    elif len(images) == 1 and sum(mark > 0 for mark in marks) == 1:
        _once(messages[next(index for index, mark in enumerate(marks) if mark)])
    elif images and sum(marks) != len(images):
        raise bad_record(f"has {counted(sum(marks), '<image> mark')} for {counted(len(images), 'image')}")
    rest = iter(images)
    for message in messages:
        parts: list[Part] = []
        for part in message.parts:
            if isinstance(part, ImageRef):
                parts.append(part)
            elif part is None:
                parts.append(next(rest))
            elif images and not places:
                parts += marked(part, [next(rest) for _ in range(part.count(IMAGE))])
            elif part:
                parts.append(part)
        yield Turn(message.role == "user", tuple(parts))


def _once(message: Message) -> None:
    """Takes away every mark but the first."""
    seen = False
    for index, part in enumerate(message.parts):
        if isinstance(part, str) and IMAGE in part:
            before, _, after = ("", "", part) if seen else part.partition(IMAGE)
            message.parts[index] = ("" if seen else before + IMAGE) + after.replace(IMAGE, "")
            seen = True
