"""What records are like, in words that can be counted: source, answer, length of the question, image or none."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from icons.datamodules.conversation import IMAGE
from icons.datamodules.dialects import Dialect, dialect_of, read_conversation
from icons.datamodules.failed_row import FailedRowError
from icons.datamodules.record_lists import source_of
from icons.datamodules.records import RecordSource

_TRAITS = ("source", "answer", "question", "image")
_SHORT_ANSWER = 3
"""Words up to which an answer is counted as it is."""
_LENGTHS = (5, 10, 20, 50)
UNREADABLE = "(unreadable)"


def traits_of(record: Any, source_field: str | None = None, dialect: Dialect | None = None) -> dict[str, str]:
    """A record's traits: its source, its first answer, the length of its first question, and whether it has an image.
    Without a dialect it is read in the first one that it fits.

    >>> turns = [{"from": "human", "value": "<image>\\nIs it red?"}, {"from": "gpt", "value": "Yes."}]
    >>> traits_of({"image": "coco/1.jpg", "conversations": turns})
    {'source': 'coco', 'answer': 'yes', 'question': '1 to 5 words', 'image': 'image'}
    """
    dialect = dialect or dialect_of(record)
    if dialect is None:
        return dict.fromkeys(_TRAITS, UNREADABLE)
    try:
        conversation = read_conversation(record, dialect)
    except FailedRowError:
        return dict.fromkeys(_TRAITS, UNREADABLE)
    questions = [turn.text for turn in conversation.turns if turn.human]
    answers = [turn.text for turn in conversation.turns if not turn.human]
    return {
        "source": source_of(record, source_field),
        "answer": _answer_of(answers[0]) if answers else "(none)",
        "question": _length_of(questions[0].replace(IMAGE, "")) if questions else "(none)",
        "image": "image" if conversation.images else "text only",
    }


def _answer_of(text: str) -> str:
    """A short answer without its case and full stop; of a longer one, that it is longer.

    >>> _answer_of("Two dogs."), _answer_of("There are two dogs in the picture")
    ('two dogs', '(4 words or more)')
    """
    words = text.lower().strip().rstrip(".").split()
    return " ".join(words) if len(words) <= _SHORT_ANSWER else f"({_SHORT_ANSWER + 1} words or more)"


def _length_of(text: str) -> str:
    """
    >>> _length_of("Is it red?"), _length_of("a " * 51)
    ('1 to 5 words', '51 words or more')
    """
    num, least = len(text.split()), 1
    for most in _LENGTHS:
        if num <= most:
            return f"{least} to {most} words"
        least = most + 1
    return f"{least} words or more"


def read_traits(
    records: RecordSource, rows: Iterable[int], source_field: str | None = None, dialect: Dialect | None = None
) -> Mapping[str, np.ndarray]:
    """The traits of the given rows: trait -> an array of words."""
    traits: dict[str, list[str]] = {name: [] for name in _TRAITS}
    for row in rows:
        try:
            record = records[row]
        except ValueError:  # a line that is no JSON
            record = None
        for name, value in traits_of(record, source_field, dialect).items():
            traits[name].append(value)
    return {name: np.array(values, dtype=object) for name, values in traits.items()}
