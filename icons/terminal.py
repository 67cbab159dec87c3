"""The terminal: text from files is shown, and never obeyed."""

import re
from typing import Any

from rich import console
from rich.text import Text

# what moves the cursor, sets colours and titles, or turns the direction of writing
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def legible(text: str) -> str:
    """A text with its control characters written out; line ends and tabs stay.

    >>> legible("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one.

    >>> counted(1, "row"), counted(1200, "row"), counted(0, "failed row")
    ('1 row', '1,200 rows', '0 failed rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Console(console.Console):
    """rich's console, for texts of which some come from files: their control characters are written out.

    Markup in them is for the caller to escape (`rich.markup.escape`, `markup=False`).
    """

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(legible(text), **options)
