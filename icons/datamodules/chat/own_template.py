"""OwnTemplate: the template `chat`, a tokenizer's own chat template, for text models and LLaVAs."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from icons.batch import IGNORE_INDEX
from icons.datamodules.chat.rendering import ChatTemplate, Rendered
from icons.datamodules.chat.skeleton import IMAGE_PART, Message, Part, TemplateError
from icons.datamodules.chat.templates import IMAGE_PLACE, Tokens, Turn, alternating, encode
from icons.datamodules.conversation import IMAGE


class OwnTemplate:
    """Turns -> ids and labels by a tokenizer's own chat template; each answer and its end token are supervised.

    The text is tokenised as a whole, as `apply_chat_template` does, where the tokenizer tells which characters a token
    came from; else in pieces.

    Args:
        tokenizer: with a chat template.
        what: whose it is, for messages.
        image_token: the model's image token, as its template writes it; None: no images.

    Raises:
        ValueError: there is no chat template, or it leaves texts out.
    """

    def __init__(self, tokenizer: Any, what: str, image_token: str | None = None) -> None:
        marks = dict.fromkeys([image_token, IMAGE]) if image_token else ()
        self.template = ChatTemplate(tokenizer, what, [mark for mark in marks if mark])

    def __call__(
        self, tokenizer: Any, turns: Sequence[Turn], image: bool, max_length: int, system: str | None = None
    ) -> Tokens:
        """Ids hold IMAGE_PLACE once for each image.

        Raises:
            TemplateError: the turns do not alternate, the chat template has no form for them, or there is an image and
                the model takes none.
        """
        if image and not self.template.mark:
            raise TemplateError("the record has an image and the model takes none")
        rendered = self.template(messages_of(alternating(turns), image, system))
        ids: list[int] = []
        labels: list[int] = []
        for begin, end in _pieces(rendered, tokenizer.is_fast):
            if (begin, end) in rendered.images:
                ids.append(IMAGE_PLACE)
                labels.append(IGNORE_INDEX)
                continue
            text = rendered.text[begin:end]
            if tokenizer.is_fast:
                encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                tokens, places = encoded.input_ids, encoded.offset_mapping
            else:
                tokens = encode(tokenizer, text)
                places = [(0, end - begin)] * len(tokens)
            ids += tokens
            for token, (first, last) in zip(tokens, places, strict=True):
                answers = any(first + begin < stop and last + begin > start for start, stop in rendered.answers)
                labels.append(token if answers else IGNORE_INDEX)
        return Tokens(ids, labels)


def messages_of(turns: Sequence[Turn], image: bool, system: str | None = None) -> list[Message]:
    """Turns as messages, a system text before them; if `image`, each mark is an image's place, and otherwise text."""
    first = [] if system is None else [Message("system", (system,))]
    return [*first, *(Message("user" if turn.human else "assistant", _parts_of(turn.text, image)) for turn in turns)]


def _parts_of(text: str, image: bool) -> tuple[Part, ...]:
    """A turn's text as texts and image places in their order.

    >>> [part if isinstance(part, str) else "(image)" for part in _parts_of("<image>\\nWhat?", True)]
    ['(image)', '\\nWhat?']
    """
    pieces = text.split(IMAGE) if image else [text]
    parts: list[Part] = [pieces[0]] if pieces[0] or len(pieces) == 1 else []
    for piece in pieces[1:]:
        parts += [IMAGE_PART, piece] if piece else [IMAGE_PART]
    return tuple(parts)


def _pieces(rendered: Rendered, whole: bool) -> list[tuple[int, int]]:
    """Where to cut a text before it is tokenised: around each image and, unless `whole`, around each answer."""
    spans = rendered.images if whole else [*rendered.images, *rendered.answers]
    places = {0, len(rendered.text), *(edge for span in spans for edge in span)}
    return list(pairwise(sorted(places)))
