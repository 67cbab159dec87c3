"""One meaning of a conversation, however it is written; what has none says why."""

import base64
from typing import Any

import pytest

from icons.batch import Status
from icons.datamodules.conversation import Conversation, ImageRef, Turn
from icons.datamodules.dialects import DIALECTS, detect, dialect_of, read_conversation
from icons.datamodules.failed_row import FailedRowError

A, B = ImageRef("a.png"), ImageRef("b.png")
RED = Conversation((Turn(True, (A, "\nRed?")), Turn(False, ("Yes",))), "Be brief.")
TWO = Conversation((Turn(True, (A, "Red?")), Turn(False, ("Yes",)), Turn(True, ("And ", B)), Turn(False, ("No",))))
BARE = Conversation((Turn(True, ("Red?",)), Turn(False, ("Yes",))))


def llava(*texts: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def chat(*contents: Any, **fields: Any) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents)]
    return {"messages": turns, **fields}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


SAME: dict[str, tuple[str, dict[str, Any], Conversation]] = {
    "LLaVA with a system field": ("llava", llava("<image>\nRed?", "Yes", image="a.png", system="Be brief."), RED),
    "ShareGPT with a system turn": (
        "llava",
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                *llava("<image>\nRed?", "Yes")["conversations"],
            ],
            "images": ["a.png"],
        },
        RED,
    ),
    "marks in two turns": ("llava", llava("<image>Red?", "Yes", "And <image>", "No", images=["a.png", "b.png"]), TWO),
    "no mark: the image comes first": ("llava", llava("\nRed?", "Yes", image="a.png", system="Be brief."), RED),
    "two marks in a turn for the one image": (
        "llava",
        llava("<image>\nRed?<image>", "Yes", image="a.png", system="Be brief."),
        RED,
    ),
    "no image": ("llava", llava("Red?", "Yes", image="None", images=None, system=""), BARE),
    "turns as an object of lists": (
        "llava",
        {"conversations": {"from": ["human", "gpt"], "value": ["Red?", "Yes"]}},
        BARE,
    ),
    "swift: role and content with marks": (
        "messages",
        chat("<image>Red?", "Yes", "And <image>", "No", images=["a.png", "b.png"]),
        TWO,
    ),
    "TRL: parts with images beside them": (
        "messages",
        chat(
            [{"type": "image", "text": None}, text("Red?")],
            [text("Yes")],
            [text("And "), {"type": "image", "text": None}],
            "No",
            images=["a.png", "b.png"],
        ),
        TWO,
    ),
    "OpenAI: addresses in parts": (
        "messages",
        chat(
            [{"type": "image_url", "image_url": {"url": "a.png"}}, text("Red?")],
            "Yes",
            [text("And "), {"type": "image", "image": "b.png"}],
            "No",
        ),
        TWO,
    ),
    "a developer's turn": (
        "messages",
        {
            "messages": [{"role": "developer", "content": "Be brief."}, *chat("\nRed?", "Yes")["messages"]],
            "images": ["a.png"],
        },
        RED,
    ),
    "role and content in conversations": ("messages", {"conversations": chat("Red?", "Yes")["messages"]}, BARE),
    "The Cauldron": (
        "texts",
        {
            "images": [{"path": "a.png", "bytes": None}],
            "texts": [{"user": "\nRed?", "assistant": "Yes", "source": "x"}],
        },
        Conversation(RED.turns),
    ),
    "alpaca": ("alpaca", {"instruction": "Red?", "input": "", "output": "Yes"}, BARE),
    "alpaca with history, system and image": (
        "alpaca",
        {
            "instruction": "And",
            "input": "blue?",
            "output": "No",
            "history": [["Red?", "Yes"]],
            "system": "Be brief.",
            "images": ["a.png"],
        },
        Conversation(
            (Turn(True, (A, "Red?")), Turn(False, ("Yes",)), Turn(True, ("And\nblue?",)), Turn(False, ("No",))),
            "Be brief.",
        ),
    ),
    "prompt and completion": ("prompt", {"prompt": "Red?", "completion": "Yes"}, BARE),
    "prompt and completion of messages": (
        "prompt",
        {"prompt": chat("Red?")["messages"], "completion": [{"role": "assistant", "content": "Yes"}]},
        BARE,
    ),
    "a word of a text that looks like a mark": (
        "llava",
        llava("What does <image> do in HTML?", "It embeds."),
        Conversation((Turn(True, ("What does <image> do in HTML?",)), Turn(False, ("It embeds.",)))),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_every_dialect_has_the_same_meaning(name: str) -> None:
    dialect, record, expected = SAME[name]
    found = dialect_of(record)
    assert found is DIALECTS[dialect]
    assert read_conversation(record, found) == expected


def test_embedded_images_keep_their_bytes() -> None:
    picture = {"bytes": b"\x89PNG", "path": None}
    data = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    for record in (
        {"texts": [{"user": "Red?", "assistant": "Yes"}], "images": [picture]},
        chat([{"type": "image", "image": picture}, text("Red?")], "Yes"),
    ):
        (image,) = read_conversation(record, detect([record])).images
        assert image.content == b"\x89PNG"
    (image,) = read_conversation(
        chat([{"type": "image_url", "image_url": {"url": data}}], "Yes"), DIALECTS["messages"]
    ).images
    assert image == ImageRef(data)


BAD: dict[str, tuple[Any, str]] = {
    "no object": ([1], "the record is list; expected an object with `conversations` of `from` and `value`"),
    "another dialect": (chat("a", "b"), "is written as messages; expected llava"),
    "other fields": ({"id": 1, "text": "a"}, "has id, text; expected llava"),
    "no turns": ({"id": 1, "conversations": []}, "has id, conversations (empty); expected llava"),
    "a video": (llava("<video>\na", "b", video="a.mp4"), "has video; only texts and images"),
    "audio": (llava("a", "b", audios=["a.wav"]), "has audios; only texts and images"),
    "too few images": (llava("<image>", "b", "<image>", "d", image="a.png"), "has 2 <image> marks for 1 image"),
    "too few marks": (llava("<image>", "b", images=["a.png", "b.png"]), "has 1 <image> mark for 2 images"),
    "both fields": (llava("a", "b", image="a.png", images=["b.png"]), "has both `image` and `images`"),
    "no image": (llava("<image>", "b", image=3), "has the image '3'; expected a name, an address, bytes"),
    "no question to put an image at": (
        {"conversations": [{"from": "gpt", "value": "a"}], "image": "a.png"},
        "no question",
    ),
    "a system turn in the middle": (
        {"conversations": [*llava("a", "b")["conversations"], {"from": "system", "value": "c"}]},
        "a system turn after the first",
    ),
    "two system texts": (
        {"conversations": [{"from": "system", "value": "c"}, *llava("a", "b")["conversations"]], "system": "d"},
        "a `system` field and another system turn",
    ),
    "a system that is no text": (llava("a", "b", system=["c"]), "a `system` of list; expected a text"),
    "a tool": ({"conversations": [{"from": "function_call", "value": "{}"}]}, "calls tools"),
    "an unknown speaker": ({"conversations": [{"from": "narrator", "value": "a"}]}, "a turn by 'narrator'; expected"),
    "a turn that is none": (
        {"conversations": [{"from": "human", "value": "a"}, 3]},
        "a turn without `from` and `value`",
    ),
    "no text": (
        {"conversations": [{"from": "human", "value": 3}]},
        "content is int; expected a text or a list of parts",
    ),
    "half a surrogate pair": (llava("\ud83d", "b"), "half a surrogate pair"),
    "only a system turn": ({"conversations": [{"from": "system", "value": "c"}]}, "has no turn"),
}
OTHER: dict[str, tuple[str, Any, str]] = {
    "marks and parts": (
        "messages",
        chat([{"type": "image", "image": "a.png"}, text("<image>Red?")], "b"),
        "both <image> marks and parts of type image",
    ),
    "too many parts": ("messages", chat([{"type": "image"}, text("Red?")], "b"), "1 image part for 0 images"),
    "images without a part": (
        "messages",
        chat([{"type": "image", "image": "a.png"}, text("Red?")], "b", images=["b.png"]),
        "0 image parts for 1 image",
    ),
    "a part of another kind": ("messages", chat([{"type": "video", "video": "a.mp4"}], "b"), "a part of type 'video'"),
    "an image in the system turn": (
        "messages",
        {
            "messages": [{"role": "system", "content": [{"type": "image"}]}, *chat("a", "b")["messages"]],
            "images": ["a.png"],
        },
        "an image in its system turn",
    ),
    "a call": ("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "calls tools"),
    "no pair": ("texts", {"texts": [{"user": "a", "assistant": None}]}, "no pairs of `user` and `assistant`"),
    "no history": (
        "alpaca",
        {"instruction": "a", "output": "b", "history": ["c"]},
        "`history` that is no list of pairs",
    ),
}


@pytest.mark.parametrize("name", [*BAD, *OTHER])
def test_what_has_no_meaning_says_why(name: str) -> None:
    dialect, record, reason = OTHER[name] if name in OTHER else ("llava", *BAD[name])
    with pytest.raises(FailedRowError) as failure:
        read_conversation(record, DIALECTS[dialect])
    assert reason in str(failure.value)
    assert failure.value.status == Status.BAD_RECORD


def test_the_dialect_is_that_of_most_records() -> None:
    assert detect([llava("a", "b"), chat("a", "b"), chat("a", "b"), 3]) is DIALECTS["messages"]
    assert detect([]) is detect(["text"]) is DIALECTS["llava"]
    with pytest.raises(ValueError, match="no conversation in the first 2 records, with id, text; expected llava: "):
        detect([{"id": 1, "text": "a"}, {"id": 2}])
