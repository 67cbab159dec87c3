"""The page: its parts as plain data, and the template that turns them into one self-contained HTML file.

Everything that comes from data (texts, names, paths, manifests) is escaped by the template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from matplotlib.figure import Figure

from icons.output import put
from icons.report.figures import png, svg

_GENERATOR = b'<meta name="generator" content="icons report">'


@dataclass(frozen=True)
class Fact:
    """A number at the head of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure, described for who cannot see it."""

    figure: Figure
    alt: str
    caption: str = ""
    name: str = ""
    """Sets it apart from the other pictures of its section, in file names."""

    @property
    def source(self) -> str:
        return svg(self.figure)

    @property
    def width(self) -> int:
        """Pixels on a wide page: the text of all figures comes out in one size."""
        return round(110 * self.figure.get_figwidth())


@dataclass(frozen=True)
class Cell:
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    strong: Sequence[int] = ()
    """Rows in bold."""


@dataclass(frozen=True)
class Turn:
    text: str
    answer: bool


@dataclass(frozen=True)
class ShownRow:
    """A training row with its text and image, as the page shows it."""

    row: int
    id: str
    source: str
    score: str
    stderr: str
    votes: int
    selected: bool
    turns: Sequence[Turn]
    image: str = ""
    """A `data:` address; empty for a row without an image."""
    problem: str = ""
    """Why the record or its image could not be shown."""


@dataclass(frozen=True)
class Ends:
    """The highest and lowest rows of a task, or of the consensus."""

    task: str
    note: str
    highest: Sequence[ShownRow]
    lowest: Sequence[ShownRow]
    titles: tuple[str, str] = ("highest", "lowest")


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    gallery: Sequence[Picture] = ()
    """Small figures side by side."""
    key: Sequence[tuple[str, str]] = ()
    """What the gallery's colours mean: a class of the page's style (chosen, pool, accent, below), and its words."""
    tables: Sequence[Table] = ()
    ends: Sequence[Ends] = ()
    manifests: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    facts: Sequence[Fact]
    notices: Sequence[str]
    sections: Sequence[Section]
    footer: str


def render(page: Page) -> str:
    """The page as HTML: one file, no script, nothing loaded from elsewhere."""
    from jinja2 import Environment, StrictUndefined

    template = resources.files("icons.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    return environment.from_string(template).render(page=page)


def is_page(path: Path) -> bool:
    """Whether a file is such a page, by what its head says of who made it."""
    with path.open("rb") as file:
        return _GENERATOR in file.read(1024)


def write_pictures(page: Page, folder: Path) -> list[Path]:
    """Every figure of the page as a PNG in `folder`, named by its section and, where there are several, by itself."""
    written = []
    for section in page.sections:
        for number, picture in enumerate([*section.pictures, *section.gallery]):
            own = "".join(letter if letter.isalnum() else "_" for letter in picture.name) or str(number)
            several = len(section.pictures) + len(section.gallery) > 1
            path = folder / (f"{section.id}-{own}.png" if several else f"{section.id}.png")
            put(path, png(picture.figure))
            written.append(path)
    return written
