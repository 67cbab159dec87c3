"""How questions are asked and answered: LLaVA's forms of short answers and lettered options."""

from collections import Counter
from collections.abc import Iterable, Sequence

SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."


def majority(answers: Iterable[str]) -> str:
    """The answer that most annotators gave, compared without case and outer spaces; the first given on a tie.

    Raises:
        ValueError: no answer at all.

    >>> majority(["blue", "Red", "red "])
    'Red'
    """
    given = [answer.strip() for answer in answers]
    if not given:
        raise ValueError("a question has no answers; take a split whose answers are published")
    folded = [answer.casefold() for answer in given]
    winner = Counter(folded).most_common(1)[0][0]
    return given[folded.index(winner)]


def capital(answer: str) -> str:
    """First letter in upper case, as LLaVA-665K writes short answers ("Yes", "Left"). Other letters stay.

    >>> capital("red and Blue")
    'Red and Blue'
    """
    return answer[:1].upper() + answer[1:]


def short_answer(question: str) -> str:
    """A question with LLaVA's line for short answers (its docs/Evaluation.md, form 1).

    >>> print(short_answer("Red?"))
    Red?
    Answer the question using a single word or phrase.
    """
    return f"{question}\n{SHORT_ANSWER}"


def multiple_choice(question: str, options: Sequence[str], instruction: str = OPTION_LETTER) -> str:
    """A question with one line per lettered option (LLaVA's docs/Evaluation.md, form 2).

    >>> print(multiple_choice("Red?", ["yes", "no"]))
    Red?
    A. yes
    B. no
    Answer with the option's letter from the given choices directly.
    """
    lines = [f"{letter(i)}. {option}" for i, option in enumerate(options)]
    return "\n".join([question, *lines, instruction])


def letter(index: int) -> str:
    """The letter of an option: 0 is A."""
    return chr(ord("A") + index)


def unanswerable(options: Sequence[str], answer: object) -> str | None:
    """Why a question cannot be asked by letter: its options do not tell which one is meant; None: it can.

    Args:
        options: in order.
        answer: place of the right one.

    >>> unanswerable(["sun", "moon"], 1), unanswerable(["sun", "moon", "moon"], 2)
    (None, 'options that are alike')
    """
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        return "no option for its answer"
    folded = [option.strip().casefold() for option in options]
    if len(folded) < 2 or not all(folded):
        return "fewer than two options, or an empty one"
    return "options that are alike" if folded.count(folded[answer]) > 1 else None
