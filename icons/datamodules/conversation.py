"""Conversation: what a record says, whatever dialect it is written in: turns of texts and images, a system text.

The dialects (`icons.datamodules.dialects`) make it of records; the templates (`icons.datamodules.chat`) make ids and
labels of it. Neither knows the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

IMAGE = "<image>"


@dataclass(frozen=True)
class ImageRef:
    """An image as a record names it.

    Attributes:
        name: a name inside the image folder, an absolute path, a `file://`, `data:` or `http(s)://` address, or base64.
            With `content`, only what the image is called in messages.
        content: the image file's bytes, where the record brings them along.
    """

    name: str
    content: bytes | None = None


Part = str | ImageRef


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        human: True for the user's, False for the assistant's.
        parts: texts and images in their order.
    """

    human: bool
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The parts as one text, with `<image>` in place of each image.

        >>> Turn(True, (ImageRef("a.png"), "What is it?")).text
        '<image>What is it?'
        """
        return "".join(part if isinstance(part, str) else IMAGE for part in self.parts)

    @property
    def images(self) -> list[ImageRef]:
        return [part for part in self.parts if isinstance(part, ImageRef)]


@dataclass(frozen=True)
class Conversation:
    """The turns of a record, and its system text.

    If it has images, no text of it holds `<image>`: every mark has become its image. A conversation without images may
    hold the word; it is then text as any other.

    Attributes:
        turns: in their order; nothing is said about whether they alternate, which is the template's to judge.
        system: the system text; None: the record gives none, and the template's own default stands.
    """

    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def images(self) -> list[ImageRef]:
        """All images, in the order of their places."""
        return [image for turn in self.turns for image in turn.images]

    @property
    def num_words(self) -> int:
        """Words of all turns, by which LLaVA groups rows of like length (a mark is a word, as there)."""
        return sum(len(turn.text.split()) for turn in self.turns)


def marked(text: str, images: Sequence[ImageRef]) -> tuple[Part, ...]:
    """A text with marks -> its parts, each mark replaced by the next of the images; empty texts are left out.

    >>> marked("<image>\\nRed?", [ImageRef("a.png")])
    (ImageRef(name='a.png', content=None), '\\nRed?')
    """
    pieces = text.split(IMAGE)
    assert len(pieces) == len(images) + 1
    parts: list[Part] = [pieces[0]]
    for image, piece in zip(images, pieces[1:], strict=True):
        parts += [image, piece]
    return tuple(part for part in parts if part != "")
