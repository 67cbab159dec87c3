"""Dialects: the ways in which data files write a conversation, and its one meaning.

| name | fields |
|---|---|
| `llava` | `conversations`: turns of `from` and `value`, as LLaVA and ShareGPT have them |
| `messages` | `messages` (or `conversations`): `role` and `content`, a text or a list of parts (OpenAI, TRL, swift) |
| `texts` | `texts`: pairs of `user` and `assistant` (The Cauldron, FineVision) |
| `alpaca` | `instruction`, `input`, `output` |
| `prompt` | `prompt` and `completion`: texts or messages (TRL) |

Each may have `system`, and `image` or `images`: a name, an address, bytes, `{bytes, path}`, or a list of these.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from icons.datamodules.conversation import Conversation, ImageRef, Part
from icons.datamodules.failed_row import FailedRowError, bad_record
from icons.datamodules.image_refs import Record, given, image_ref, images_of
from icons.datamodules.placement import Message, placed, system_of
from icons.terminal import counted

_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_TOOLS = ("tool", "function", "function_call", "observation")
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "system": "system", "developer": "system",
}  # fmt: skip


@dataclass(frozen=True)
class Dialect:
    """One way to write a conversation: whether a record is written so, and its messages."""

    name: str
    expects: str
    fits: Callable[[Record], bool]
    messages: Callable[[Record], list[Message]]


def read_conversation(record: Any, dialect: Dialect) -> Conversation:
    """The meaning of a record.

    Images stand where the record puts them: at `<image>` marks in its texts, or at parts of their own; where it marks
    no place, before the first question. Several marks of one turn for the record's only image are one, as LLaVA has it.

    Raises:
        FailedRowError: BAD_RECORD, for a record of another dialect; no turn; a role, a part or a medium that is not
            known; another number of places than images; a text that cannot be encoded.
    """
    if not isinstance(record, Mapping):
        raise bad_record(f"is {type(record).__name__}; expected an object with {dialect.expects}")
    if not dialect.fits(record):
        other = dialect_of(record)
        named = [f"{name}{'' if given(value) else ' (empty)'}" for name, value in list(record.items())[:8]]
        written = f"is written as {other.name}" if other else f"has {', '.join(named) or 'no field'}"
        raise bad_record(f"{written}; expected {dialect.name}: {dialect.expects}")
    for medium in _OTHER_MEDIA:
        if given(record.get(medium)):
            raise bad_record(f"has {medium}; only texts and images can be trained on")
    messages = dialect.messages(record)
    system, spoken = system_of(record.get("system"), messages)
    if not spoken:
        raise bad_record("has no turn")
    images = images_of(record)
    turns = tuple(placed(spoken, images))
    for text in [system or "", *(turn.text for turn in turns)]:
        if not _is_unicode(text):
            raise bad_record("has a text with half a surrogate pair, which is no text")
    return Conversation(turns, system)


def _listed(value: Any) -> list[Any]:
    """A list of objects; Arrow's older form, an object of lists of equal length, is turned around.

    >>> _listed({"from": ["human", "gpt"], "value": ["Red?", "Yes"]})
    [{'from': 'human', 'value': 'Red?'}, {'from': 'gpt', 'value': 'Yes'}]
    """
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        length = min(len(column) for column in value.values())
        return [{name: column[index] for name, column in value.items()} for index in range(length)]
    return value if isinstance(value, list) else []


def _has_turns(record: Record, name: str, *keys: str) -> bool:
    """Whether a field is a list of objects with these keys; an empty list too, which then has no turn."""
    turns = _listed(record.get(name))
    return bool(turns) and isinstance(turns[0], Mapping) and all(key in turns[0] for key in keys)


def message(turn: Any, role: str, content: str) -> Message:
    """A turn of a list, its role and its content under these names."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get(role), str):
        raise bad_record(f"has a turn without `{role}` and `{content}`")
    if turn[role] in _TOOLS or given(turn.get("tool_calls")):
        raise bad_record("calls tools, which no template here has a place for")
    if turn[role] not in _ROLES:
        raise bad_record(f"has a turn by {turn[role]!r}; expected one of {', '.join(_ROLES)}")
    return Message(_ROLES[turn[role]], _parts_of(turn.get(content)))


def _parts_of(content: Any) -> list[Part | None]:
    """A turn's content: a text, or a list of parts of text and images."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise bad_record(f"has a turn whose content is {type(content).__name__}; expected a text or a list of parts")
    return [_part_of(part) for part in content]


def _part_of(part: Any) -> Part | None:
    """A part: `{"type": "text", "text": ...}`, `{"type": "image"}` with or without the image, or `image_url`."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("image", "image_url", "input_image"):
        named = next(
            (part[key] for key in ("image", "image_url", "url", "path", "base64") if given(part.get(key))), None
        )
        if isinstance(named, Mapping) and isinstance(named.get("url"), str):
            named = named["url"]
        return image_ref(part) if given(part.get("bytes")) else None if named is None else image_ref(named)
    raise bad_record(f"has a part of type {kind!r}; expected text or image")


def _conversation_messages(record: Record) -> list[Message]:
    return [message(turn, "from", "value") for turn in _listed(record["conversations"])]


def _chat_field(record: Record) -> str | None:
    fields = ("messages", "conversations", "conversation")
    return next((name for name in fields if _has_turns(record, name, "role", "content")), None)


def _chat_messages(record: Record) -> list[Message]:
    return [message(turn, "role", "content") for turn in _listed(record[_chat_field(record) or ""])]


def pairs(record: Record) -> list[Message]:
    messages = []
    for pair in _listed(record["texts"]):
        for role in ("user", "assistant"):
            if not isinstance(pair, Mapping) or not isinstance(pair.get(role), str):
                raise bad_record("has `texts` that are no pairs of `user` and `assistant`")
            messages.append(Message(role, [pair[role]]))
    return messages


def alpaca(record: Record) -> list[Message]:
    history = []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise bad_record("has a `history` that is no list of pairs")
        history += [("user", pair[0]), ("assistant", pair[1])]
    question = "\n".join(str(text) for text in (record["instruction"], record.get("input")) if given(text))
    turns = [*history, ("user", question), ("assistant", record["output"])]
    return [Message(role, _parts_of(text)) for role, text in turns]


def _prompt_and_completion(record: Record) -> list[Message]:
    messages: list[Message] = []
    for role, name in (("user", "prompt"), ("assistant", "completion")):
        value = record[name]
        if isinstance(value, str):
            messages.append(Message(role, [value]))
        else:
            messages += [message(turn, "role", "content") for turn in _listed(value)]
    return messages


DIALECTS: dict[str, Dialect] = {
    "llava": Dialect(
        "llava",
        "`conversations` of `from` and `value`",
        lambda record: _has_turns(record, "conversations", "from"),
        _conversation_messages,
    ),
    "messages": Dialect(
        "messages",
        "`messages` of `role` and `content`",
        lambda record: _chat_field(record) is not None,
        _chat_messages,
    ),
    "texts": Dialect(
        "texts",
        "`texts` of `user` and `assistant`",
        lambda record: _has_turns(record, "texts", "user", "assistant"),
        pairs,
    ),
    "alpaca": Dialect(
        "alpaca",
        "`instruction` and `output`",
        lambda record: all(isinstance(record.get(name), str) for name in ("instruction", "output")),
        alpaca,
    ),
    "prompt": Dialect(
        "prompt",
        "`prompt` and `completion`",
        lambda record: all(isinstance(record.get(name), str | list) for name in ("prompt", "completion")),
        _prompt_and_completion,
    ),
}


def images_within(record: Record, dialect: Dialect | None = None) -> list[ImageRef]:
    """A record's images: of a field of its own, or else of parts of its turns, where these can be read.

    Raises:
        FailedRowError: the field holds something else.

    >>> part = {"type": "image", "image": "coco/1.jpg"}
    >>> images_within({"messages": [{"role": "user", "content": [part]}]})[0].name
    'coco/1.jpg'
    """
    images, dialect = images_of(record), dialect or dialect_of(record)
    if not images and dialect is not None:
        with suppress(FailedRowError):
            images = read_conversation(record, dialect).images
    return images


def dialect_named(name: str) -> Dialect | None:
    """The dialect of a name; None for "auto".

    Raises:
        ValueError: there is none of that name.
    """
    if name not in ("auto", *DIALECTS):
        raise ValueError(f"dialect {name!r}; expected auto or one of {', '.join(DIALECTS)}")
    return DIALECTS.get(name)


def dialect_of(record: Any) -> Dialect | None:
    """The dialect that a record is written in; None if it is none of them."""
    if not isinstance(record, Mapping):
        return None
    return next((dialect for dialect in DIALECTS.values() if dialect.fits(record)), None)


def detect(records: Sequence[Any]) -> Dialect:
    """The dialect of most of the records; LLaVA's where none of them is an object at all.

    Raises:
        ValueError: there are objects, and none of them is a conversation.
    """
    objects = [record for record in records if isinstance(record, Mapping)]
    counts = Counter(dialect.name for record in objects if (dialect := dialect_of(record)))
    if counts:
        return DIALECTS[counts.most_common(1)[0][0]]
    if objects:
        fields = ", ".join(map(str, list(objects[0])[:12])) or "no field"
        forms = "; ".join(f"{dialect.name}: {dialect.expects}" for dialect in DIALECTS.values())
        raise ValueError(
            f"no conversation in the first {counted(len(objects), 'record')}, with {fields}; expected {forms}"
        )
    return DIALECTS["llava"]


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded: half a surrogate pair, which JSON can hold, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
