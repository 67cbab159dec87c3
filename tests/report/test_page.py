"""The page is one file that loads nothing, and shows data as text whatever it holds."""

import html.parser
from pathlib import Path

import numpy as np

from icons.report.figures import vote_histogram
from icons.report.page import Cell, Ends, Fact, Page, Picture, Section, ShownRow, Table, Turn, render, write_pictures

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"


class Reader(html.parser.HTMLParser):
    """Collects the tags and attributes of a page, and checks that tags close in order."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page() -> Page:
    figure = vote_histogram(np.array([3, 1]), np.array([0, 1]))
    row = ShownRow(3, HOSTILE, HOSTILE, "0.1", "0.01", 2, True, [Turn(HOSTILE, False)], problem=HOSTILE)
    section = Section(
        id="one",
        title=HOSTILE,
        text=[HOSTILE],
        pictures=[Picture(figure, HOSTILE, HOSTILE)],
        gallery=[Picture(figure, HOSTILE, name=HOSTILE)],
        tables=[Table([HOSTILE], [[Cell(HOSTILE, HOSTILE)]], HOSTILE, [0])],
        ends=[Ends(HOSTILE, "0.5", [row], [row])],
        manifests={HOSTILE: [(HOSTILE, HOSTILE)]},
    )
    return Page(HOSTILE, HOSTILE, [Fact(HOSTILE, HOSTILE, HOSTILE)], [HOSTILE], [section], HOSTILE)


def test_everything_from_data_is_escaped() -> None:
    reader = Reader()
    reader.feed(render(page()))
    assert reader.open == []
    assert not [tag for tag, _ in reader.tags if tag in ("script", "iframe", "object", "link", "form")]
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:")
            assert "alt" in attributes
    assert reader.text.count(HOSTILE) > 15


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = render(page()).replace(HOSTILE, "")
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_pictures_are_written_beside_the_page(tmp_path: Path) -> None:
    written = write_pictures(page(), tmp_path / "figures")
    assert written[0] == tmp_path / "figures" / "one-0.png"
    assert all(path.parent == tmp_path / "figures" and path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert len(set(written)) == 2
