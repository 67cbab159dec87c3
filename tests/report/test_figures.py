"""Figures are SVG text without a date or colliding identifiers, and PNG on white."""

import base64
import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from icons.report import figures

CASES = {
    "votes": lambda: figures.vote_histogram(np.array([9, 5, 2]), np.array([0, 3, 2])),
    "scores": lambda: figures.score_distribution("gqa", np.array([1, 4, 2]), np.linspace(-1, 1, 4), 0.5),
    "no threshold": lambda: figures.score_distribution("gqa", np.array([1, 4, 2]), np.linspace(-1, 1, 4), np.nan),
    "overlap": lambda: figures.heat_map(["a", "b"], np.array([[1.0, 0.2], [0.4, 1.0]])),
    "one task": lambda: figures.heat_map(["a"], np.array([[1.0]])),
    "twenty tasks": lambda: figures.heat_map(
        [f"task {i}" for i in range(20)], np.random.default_rng(0).random((20, 20))
    ),
    "composition": lambda: figures.composition(["coco", "vg"], np.array([0.7, 0.3]), np.array([0.5, 0.5])),
    "specialists": lambda: figures.specialists(["a", "b"], np.array([0.7, 0.3]), 0.2),
    "border": lambda: figures.border("a", np.linspace(0.1, 0.3, 5), np.linspace(1, 0, 5), np.full(5, 0.1), 0.5),
    "dots": lambda: figures.dots(["full", "vote"], [[100.0], [96.0, 97.0]], 100.0),
    "intervals": lambda: figures.intervals(
        ["x", "y"], np.array([0.3, 0.1]), np.array([0.2, -0.1]), np.array([0.4, 0.3])
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_figure_becomes_the_same_svg_each_time(name: str) -> None:
    figure = CASES[name]()
    assert isinstance(figure, Figure)
    address = figures.svg(figure)
    assert address.startswith("data:image/svg+xml;base64,")
    assert address == figures.svg(CASES[name]())
    text = base64.b64decode(address.split(",")[1]).decode()
    assert "<svg" in text and "system-ui" in text and "http://purl.org/dc/elements" not in text.split("</metadata>")[-1]


def test_png_is_on_white() -> None:
    with Image.open(io.BytesIO(figures.png(CASES["votes"]()))) as image:
        assert image.width > 1000
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


def test_numbers_that_read_the_same_have_nearly_the_same_colour() -> None:
    others = np.array([[1.0, 0.361, 0.363], [0.361, 1.0, 0.359], [0.363, 0.359, 1.0]])
    image = figures.heat_map(["a", "b", "c"], others).axes[0].get_images()[0]
    colours = image.cmap(image.norm(others[~np.eye(3, dtype=bool)]))
    assert np.ptp(colours, axis=0).max() < 0.03


def test_task_names_are_escaped_in_the_svg() -> None:
    figure = figures.heat_map(["<script>alert(1)</script>", "b"], np.array([[1.0, 0.2], [0.4, 1.0]]))
    assert b"<script>" not in base64.b64decode(figures.svg(figure).split(",")[1])


def test_dollar_signs_in_names_are_not_read_as_mathematics() -> None:
    assert b"a$b$" in base64.b64decode(
        figures.svg(figures.heat_map(["a$b$", "b"], np.array([[1.0, 0.2], [0.4, 1.0]]))).split(",")[1]
    )


@pytest.mark.parametrize(
    "figure",
    [
        figures.vote_histogram(np.array([9, 5, 20]), np.array([0, 3, 20])),
        figures.composition(["a", "b", "c"], np.array([0.3, 0.3, 0.4]), np.array([0.1, 0.1, 0.8])),
        figures.composition(["a", "b", "c"], np.array([0.8, 0.1, 0.1]), np.array([0.3, 0.3, 0.4])),
    ],
    ids=["votes", "composition, long at the bottom", "composition, long at the top"],
)
def test_the_legend_covers_nothing(figure: Figure) -> None:
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    box = legend.get_window_extent()
    others = [*axes.texts, *axes.patches, *axes.get_xticklabels(), *axes.get_yticklabels()]
    assert others and not [other for other in others if other.get_window_extent().overlaps(box)]


@pytest.mark.parametrize("low", [-0.16, -1234.5, 0.001])
def test_no_label_leaves_the_picture(low: float) -> None:
    for figure in (
        figures.score_distribution("gqa", np.array([1, 4, 2]), np.linspace(low, -low / 2, 4), 0.0),
        figures.border("a", np.linspace(0, 1, 5), np.linspace(low, -low, 5), np.full(5, 0.1), 0.0),
    ):
        figure.draw_without_rendering()
        (axes,) = figure.axes
        first, last = sorted(axes.get_xlim())
        for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
            if first <= place <= last:
                box = label.get_window_extent()
                assert box.x0 >= 0 and box.x1 <= figure.bbox.width, label.get_text()


@pytest.mark.parametrize("num_tasks", [1, 2, 4, 7, 8, 22])
def test_counts_of_votes_do_not_run_into_each_other(num_tasks: int) -> None:
    figure = figures.vote_histogram(np.full(num_tasks + 1, 199_999), np.full(num_tasks + 1, 7))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == num_tasks + 1
    assert not [a for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


def test_the_palette_changes_where_the_system_is_dark() -> None:
    text = base64.b64decode(figures.svg(CASES["votes"]()).split(",")[1]).decode()
    assert "@media (prefers-color-scheme: dark)" in text
    for light, dark in figures.DARK.items():
        assert f'[style*="fill: {light}"] {{ fill: {dark} !important }}' in text
    assert f"fill: {figures.CHOSEN}" in text.split("</style>")[-1]
