"""The questions of the common task: four kinds of short ones, one of them about the real world.

city: which continent a city of the IANA time zone database lies on. letter: a city's last letter. sum: of two numbers.
more: is one number more than another. A pool has 10 % wrong answers of the right form.
"""

import random
import string
import zoneinfo
from dataclasses import dataclass

CONTINENTS = ("Africa", "America", "Asia", "Europe", "Pacific")
WORDINGS = {
    "city": ("where is {0}?", "on which continent is {0}?", "{0} is a city in"),
    "letter": ("last letter of {0}?", "how does {0} end?", "{0} ends with"),
    "sum": ("what is {0} plus {1}?", "add {0} and {1}", "{0} and {1} make"),
    "more": ("is {0} more than {1}?", "is {0} above {1}?", "does {0} beat {1}?"),
}
SHARES = {"city": 0.4, "letter": 0.2, "sum": 0.2, "more": 0.2}
WRONG = 0.1
TASKS = tuple(SHARES)


@dataclass(frozen=True)
class Question:
    """One row: `kind`, what is asked, what is answered, and whether the answer is wrong."""

    kind: str
    text: str
    answer: str
    wrong: bool = False

    def record(self) -> dict[str, object]:
        turns = [{"from": "human", "value": self.text}, {"from": "gpt", "value": self.answer}]
        return {"conversations": turns, "kind": self.kind, "wrong": self.wrong}


def cities() -> list[tuple[str, str]]:
    """City and continent, in the order of the zones' names; Istanbul and Nicosia have zones on two continents."""
    zones = [name.split("/") for name in sorted(zoneinfo.available_timezones())]
    return [(parts[1].replace("_", " "), parts[0]) for parts in zones if len(parts) == 2 and parts[0] in CONTINENTS]


def ask(kind: str, wording: str, known: list[tuple[str, str]], draw: random.Random) -> Question:
    """A question of one kind in one wording."""
    name, continent = draw.choice(known)
    if kind in ("city", "letter"):
        return Question(kind, wording.format(name), continent if kind == "city" else name[-1].lower())
    one, other = (draw.randrange(20), draw.randrange(20)) if kind == "sum" else draw.sample(range(100), 2)
    answer = str(one + other) if kind == "sum" else ("yes" if one > other else "no")
    return Question(kind, wording.format(one, other), answer)


def mislead(question: Question, draw: random.Random) -> Question:
    """The same question with a wrong answer of the right form."""
    of_kind = {
        "city": CONTINENTS,
        "letter": tuple(string.ascii_lowercase),
        "sum": tuple(str(number) for number in range(39)),
        "more": ("yes", "no"),
    }[question.kind]
    wrong = draw.choice([answer for answer in of_kind if answer != question.answer])
    return Question(question.kind, question.text, wrong, wrong=True)


def draw_pool(count: int, known: list[tuple[str, str]], seed: int) -> list[Question]:
    """A shuffled pool in the shares of `SHARES`, in the first two wordings, `WRONG` of each kind answered wrongly."""
    draw, pool = random.Random(seed), []
    for kind, share in SHARES.items():
        size = round(count * share)
        for place in range(size):
            question = ask(kind, draw.choice(WORDINGS[kind][:2]), known, draw)
            pool.append(mislead(question, draw) if place < round(size * WRONG) else question)
    draw.shuffle(pool)
    return pool


def draw_task(kind: str, count: int, known: list[tuple[str, str]], seed: int) -> list[Question]:
    """Validation rows of one kind, in the third wording: what is asked is in the pool, how it is asked is not."""
    draw = random.Random(f"{seed}/{kind}")
    return [ask(kind, WORDINGS[kind][2], known, draw) for _ in range(count)]


def draw_start(count: int, known: list[tuple[str, str]], seed: int) -> list[Question]:
    """What the start is trained on: all wordings, of cities that neither pool nor tasks name, and of numbers."""
    draw = random.Random(f"{seed}/start")
    return [ask(kind, draw.choice(WORDINGS[kind]), known, draw) for kind in draw.choices(TASKS, k=count)]
