import json
from pathlib import Path

import pytest

from icons.datamodules.dialects import dialect_named
from icons.datamodules.records import open_records
from icons.datamodules.traits import UNREADABLE, read_traits, traits_of


def llava(question: str, answer: str, **fields: str) -> dict:
    return fields | {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
CASES = [
    (llava("<image>\nWhat?", " Yes. ", image="coco/1.jpg"), ["coco", "yes", "image"]),
    (llava("Say it", "A dog runs over there"), ["text only", "(4 words or more)", "text only"]),
    (CHAT, ["text only", "hello", "text only"]),
]


@pytest.mark.parametrize(("record", "expected"), CASES)
def test_records_of_any_dialect_have_traits(record: dict, expected: list[str]) -> None:
    found = traits_of(record)
    assert [found["source"], found["answer"], found["image"]] == expected


def test_a_record_of_two_dialects_has_the_traits_of_the_one_that_is_asked_for() -> None:
    both = llava("Red?", "Yes") | CHAT
    assert [traits_of(both, None, dialect_named(name))["answer"] for name in ("auto", "messages")] == ["yes", "hello"]


def test_what_cannot_be_read_is_a_kind_of_its_own(tmp_path: Path) -> None:
    good = json.dumps(CHAT | {"provenance": "web"})
    (tmp_path / "data.jsonl").write_text(f"{good}\nno json\n17\n" + '{"id": 1}\n')
    found = read_traits(open_records(tmp_path / "data.jsonl"), [0, 1, 2, 3], "provenance")
    assert found["source"].tolist() == ["web", UNREADABLE, UNREADABLE, UNREADABLE]
    assert found["answer"].tolist()[0] == "hello" and found["question"].tolist()[0] == "1 to 5 words"
