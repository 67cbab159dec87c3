"""Skeleton: what a chat template writes around the texts of a conversation, and where the texts stand in it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant"]
_SENTINEL = re.compile(r"IconsText(\d{4})")


class TemplateError(ValueError):
    """A conversation that the template has no form for; its row fails."""


class ImagePlace:
    """Stands among a message's parts where an image is."""


IMAGE_PART = ImagePlace()
Part = str | ImagePlace


class Message(NamedTuple):
    """One message: texts and image places in their order."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Slot:
    """A text of a conversation: which message it is of, and whether a template may leave it out (earlier thoughts)."""

    message: int
    text: str
    required: bool = True
    answer: bool = False


@dataclass(frozen=True)
class Skeleton:
    """What a template writes around the texts: `literals[0] text literals[1] text ...`, and which slots those are."""

    literals: list[str]
    slots: list[int]


def sentinel(number: int) -> str:
    return f"IconsText{number:04d}"


def slots_of(messages: Sequence[Message], thoughts: bool) -> list[Slot]:
    """The texts of messages in their order; where a template knows of them, an answer's thoughts apart."""
    slots = []
    for number, message in enumerate(messages):
        answer = message.role == "assistant"
        for part in message.parts:
            if not isinstance(part, str):
                continue
            thought, closed, rest = part.rpartition("</think>")
            if thoughts and answer and closed:
                thought = thought.rpartition("<think>")[2]
                slots.append(Slot(number, thought, required=False, answer=True))
                slots.append(Slot(number, rest, answer=True))
            else:
                slots.append(Slot(number, part, answer=answer))
    return slots


def sentinels(slots: Sequence[Slot]) -> list[str]:
    """Words of our own in place of the texts; a thought and its answer are one text."""
    numbers = iter(range(len(slots)))
    return [
        sentinel(number)
        if slots[number].required
        else f"<think>\n{sentinel(number)}\n</think>\n\n{sentinel(next(numbers))}"
        for number in numbers
    ]


def skeleton_in(text: str, messages: Sequence[Message], slots: Sequence[Slot]) -> Skeleton:
    """The skeleton of messages that a template has written with `sentinels` in place of their texts.

    Raises:
        TemplateError: it leaves a text out, writes it twice or elsewhere, or writes a list of parts as it is in Python.
    """
    pieces = _SENTINEL.split(text)
    literals, order = pieces[::2], [int(number) for number in pieces[1::2]]
    for number, slot in enumerate(slots):
        times = order.count(number)
        if times > 1 or (times == 0 and slot.required):
            role = messages[slot.message].role
            does = "leaves out" if times == 0 else "writes twice"
            raise TemplateError(f"the chat template {does} the text of message {slot.message + 1} ({role})")
    if order != sorted(order):
        raise TemplateError("the chat template writes the texts in another order")
    if any("'type':" in literal or '"type":' in literal for literal in literals):
        raise TemplateError("the chat template writes the content's list of parts as it stands in Python")
    return Skeleton(literals, order)


def place(text: str, skeleton: Skeleton, slots: Sequence[Slot]) -> list[tuple[int, int]] | None:
    """Where the texts stand in a rendered conversation, each as it is or without white space at its ends.

    None: the conversation is not the skeleton with these texts.

    >>> slots = [Slot(0, " Hi "), Slot(1, "you")]
    >>> place("<u>Hi<a>you<e>", Skeleton(["<u>", "<a>", "<e>"], [0, 1]), slots)
    [(3, 5), (8, 11)]
    """
    first = skeleton.literals[0]
    if not text.startswith(first):
        return None
    reached: dict[int, list[tuple[int, int]]] = {len(first): []}  # where one can be -> the places so far
    for number, literal in zip(skeleton.slots, skeleton.literals[1:], strict=True):
        onward: dict[int, list[tuple[int, int]]] = {}
        for position, places in reached.items():
            for spelling in _spellings(slots[number].text):
                end = position + len(spelling)
                if text.startswith(spelling, position) and text.startswith(literal, end):
                    onward.setdefault(end + len(literal), [*places, (position, end)])
        reached = onward
    return reached.get(len(text))


def _spellings(text: str) -> list[str]:
    """A text as templates write it: whole first, then trimmed."""
    trimmed = (text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
    return list(dict.fromkeys((text, *trimmed)))


def common_prefix(a: str, b: str) -> str:
    """What two texts begin with, character by character.

    >>> common_prefix("<e>\\n<u>", "<e>\\n")
    '<e>\\n'
    """
    same = next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:same]


def whole_tokens(text: str, strip: bool = True) -> str:
    """A beginning that two texts have in common, without a special token that they have only a part of.

    >>> whole_tokens("<|end|>\\n<|")
    '<|end|>'
    """
    for opening, closing in ("<>", "[]"):
        at = text.rfind(opening)
        if at > text.rfind(closing):
            text = text[:at]
    return text.rstrip() if strip else text
