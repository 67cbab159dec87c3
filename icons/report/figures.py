"""The report's pictures: numbers in, matplotlib figures out. One palette, no global matplotlib state."""

import base64
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

_INK, _MUTED, _RULE = "#1c2430", "#667080", "#d9dde3"
_POOL, CHOSEN, _ACCENT = "#c3ccd6", "#1f5f8b", "#c4532f"
_BELOW = "#8b98a6"
DARK = {_INK: "#e4e8ee", _MUTED: "#9aa5b4", _RULE: "#3a4351", _POOL: "#4a5563", CHOSEN: "#62a8d8", _ACCENT: "#ea8a63"}
"""What the colours become where the reader's system is dark; others, as inside the heat map, stay."""
_ON_FIELD = "#1c2431"
"""Ink on a light field of the heat map, which stays light: INK in all but name."""
_MAX_UPRIGHT = 8
"""Bars above which their numbers stand upright, so that none runs into the next."""
_LEAST_SPREAD = 0.1
"""Difference of two shares that the heat map's whole scale stands for at least: equal numbers look equal."""
_SCALE = LinearSegmentedColormap.from_list("icons", ["#f6f7f8", "#9dbdd3", CHOSEN, "#123a57"])
_PAGE_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: sharp, small, and in the page's font
    "svg.hashsalt": "icons",  # the same numbers give the same file
    "text.parse_math": False,  # a task called "$x$" is a name
    "font.size": 8.8,
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "xtick.labelsize": 8.2,
    "ytick.labelsize": 8.6,
    "legend.frameon": False,
    "legend.fontsize": 8.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "figure.constrained_layout.use": True,
}


@contextmanager
def _canvas(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        yield figure, figure.add_subplot()


@contextmanager
def small(title: str, height: float, left: float = 0.08) -> Iterator[tuple[Figure, Axes]]:
    """One of several figures side by side: the same frame in each, so that they line up."""
    width = 2.5
    with mpl.rc_context(_STYLE | {"figure.constrained_layout.use": False}):
        figure = Figure(figsize=(width, height))
        bottom = 0.22 if left < 0.1 else 0.36
        # a label stands centred under its tick: the frame leaves half a label's width on either side
        axes = figure.add_axes((left, bottom / height, 0.92 - left, 1 - (bottom + 0.24) / height))
        figure.text(0.02, 1 - 0.04 / height, title, va="top", weight="bold", size=8.5)
        yield figure, axes


def _legend_above(axes: Axes) -> None:
    """The legend where no bar can reach it."""
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2, handlelength=0.9, handleheight=0.9
    )


def vote_histogram(pool: Int[np.ndarray, " votes"], chosen: Int[np.ndarray, " votes"]) -> Figure:
    """Rows by number of votes; the selected part of each bar is dark.

    Args:
        pool: rows with 0, 1, 2, ... votes.
        chosen: how many of them are selected.
    """
    many = len(pool) > _MAX_UPRIGHT
    with _canvas(5.6, 2.9 if many else 2.5) as (figure, axes):
        votes = np.arange(len(pool))
        axes.bar(votes, pool, width=0.82, color=_POOL, label="not selected")
        axes.bar(votes, chosen, width=0.82, color=CHOSEN, label="selected")
        for vote, count in zip(votes, pool, strict=True):
            axes.annotate(
                f"{count:,}", (vote, count), (0, 2), textcoords="offset points", ha="center", va="bottom", color=_MUTED,
                rotation=90 if many else 0, size=7.2 if many else None,
            )  # fmt: skip
        axes.set_xticks(votes)
        axes.tick_params(axis="x", labelsize=7.2 if many else None)
        axes.set_xlabel("tasks that vote for the row")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.02, y=0.3 if many else 0.14)
        _legend_above(axes)
    return figure


def score_distribution(
    task: str, counts: Int[np.ndarray, " bins"], edges: Float[np.ndarray, " edges"], threshold: float
) -> Figure:
    """Histogram of one task's scores; the part above the threshold is dark."""
    with small(task, 1.35) as (figure, axes):
        middle, width = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
        axes.bar(middle, counts, width=width, color=np.where(middle >= threshold, CHOSEN, _POOL))
        if np.isfinite(threshold):
            axes.axvline(threshold, color=_ACCENT, linewidth=1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
        axes.margins(x=0.01)
    return figure


def heat_map(names: Sequence[str], overlap: Float[np.ndarray, "tasks tasks"]) -> Figure:
    """Share of rows that two tasks' own selections have in common, as in the paper's figure; numbers in percent."""
    side = min(6.2, 1.5 + 0.42 * len(names))
    with _canvas(side, side - 0.35) as (figure, axes):
        off = overlap[~np.eye(len(names), dtype=bool)]
        low, high = (float(off.min()), float(off.max())) if off.size else (0.0, 1.0)
        low = min(low, high - _LEAST_SPREAD)
        low = max(0.0, low - 0.25 * (high - low) - 0.02)  # the lightest field still differs from the page
        others = np.where(np.eye(len(names), dtype=bool), np.nan, overlap)
        axes.imshow(others, cmap=_SCALE, vmin=low, vmax=max(high, low + 1e-9))
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        size = 7.5 if len(names) <= 12 else 5.5
        for i, j in np.argwhere(~np.eye(len(names), dtype=bool)):
            dark = overlap[i, j] - low > 0.4 * (high - low)
            axes.text(
                j,
                i,
                f"{100 * overlap[i, j]:.0f}",
                ha="center",
                va="center",
                size=size,
                color="white" if dark else _ON_FIELD,
            )
    return figure


def composition(
    names: Sequence[str], pool: Float[np.ndarray, " sources"], chosen: Float[np.ndarray, " sources"]
) -> Figure:
    """Share of each source in the pool and in the selection."""
    with _canvas(5.6, 0.55 + 0.36 * len(names)) as (figure, axes):
        positions = np.arange(len(names))
        axes.barh(positions - 0.19, pool, height=0.34, color=_POOL, label="pool")
        axes.barh(positions + 0.19, chosen, height=0.34, color=CHOSEN, label="selection")
        for y, share in [*zip(positions - 0.19, pool, strict=True), *zip(positions + 0.19, chosen, strict=True)]:
            axes.annotate(f"{100 * share:.1f} %", (share, y), (3, 0), textcoords="offset points", va="center", size=7)
        axes.set_yticks(positions, names, color=_INK)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.margins(x=0.12)
        _legend_above(axes)
    return figure


def specialists(names: Sequence[str], shared: Float[np.ndarray, " tasks"], expected: float) -> Figure:
    """For each task, the share of its own best rows that the consensus selected; a line at what chance would give."""
    with _canvas(5.6, 0.75 + 0.26 * len(names)) as (figure, axes):
        positions = np.arange(len(names))
        axes.barh(positions, shared, height=0.62, color=CHOSEN)
        axes.axvline(expected, color=_ACCENT, linewidth=1)
        axes.annotate(
            "chance", (expected, 1), (3, -1), xycoords=("data", "axes fraction"), textcoords="offset points",
            color=_ACCENT, size=7, va="bottom",
        )  # fmt: skip
        for y, share in zip(positions, shared, strict=True):
            axes.annotate(f"{100 * share:.0f} %", (share, y), (3, 0), textcoords="offset points", va="center", size=7.5)
        axes.set_yticks(positions, names, color=_INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        axes.spines[["bottom", "left"]].set_visible(False)
    return figure


def border(
    task: str,
    rank: Float[np.ndarray, " rows"],
    score: Float[np.ndarray, " rows"],
    stderr: Float[np.ndarray, " rows"],
    threshold: float,
) -> Figure:
    """Scores around one task's threshold with their 95 % intervals, by rank (share of the pool ranked higher)."""
    with small(task, 1.6, left=0.2) as (figure, axes):
        for part, colour in ((score >= threshold, CHOSEN), (score < threshold, _BELOW)):
            axes.errorbar(
                100 * rank[part], score[part], 1.96 * stderr[part], fmt="o", markersize=1.8, color=colour,
                ecolor=colour, elinewidth=0.6, capsize=0,
            )  # fmt: skip
        axes.axhline(threshold, color=_ACCENT, linewidth=1)
        axes.set_xlabel("rank, % of the pool", size=7)
        axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(3))
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    return figure


def dots(names: Sequence[str], values: Sequence[Sequence[float]], reference: float | None = None) -> Figure:
    """One line per method: a dot per seed and the mean; a line at the reference."""
    with _canvas(5.6, 0.65 + 0.3 * len(names)) as (figure, axes):
        for y, (name, seeds) in enumerate(zip(names, values, strict=True)):
            strong = name.lower() not in ("full", "random")
            axes.plot(seeds, [y] * len(seeds), "o", markersize=4, color=CHOSEN if strong else _BELOW, alpha=0.45)
            mean = float(np.mean(seeds))
            axes.plot([mean], [y], "|", markersize=13, markeredgewidth=2, color=CHOSEN if strong else _MUTED)
        if reference is not None:
            axes.axvline(reference, color=_ACCENT, linewidth=1)
        axes.set_yticks(range(len(names)), names, color=_INK)
        axes.invert_yaxis()
        axes.spines["left"].set_visible(False)
        axes.margins(y=0.12)
    return figure


def intervals(
    names: Sequence[str],
    values: Float[np.ndarray, " methods"],
    low: Float[np.ndarray, " methods"],
    high: Float[np.ndarray, " methods"],
) -> Figure:
    """One line per method: an estimate with its interval; a line at zero."""
    with _canvas(5.6, 0.65 + 0.26 * len(names)) as (figure, axes):
        positions = np.arange(len(names))
        axes.hlines(positions, low, high, color=CHOSEN, linewidth=1.4)
        axes.plot(values, positions, "o", markersize=4.5, color=CHOSEN)
        axes.axvline(0, color=_RULE, linewidth=0.8)
        axes.set_yticks(positions, names, color=_INK)
        axes.invert_yaxis()
        axes.spines["left"].set_visible(False)
        axes.margins(y=0.1)
    return figure


def svg(figure: Figure) -> str:
    """The figure as a `data:` address for an `<img>`: identifiers of several figures on a page cannot collide."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
    text = re.sub(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", b"", buffer.getvalue())  # XML has none of them
    text = text.replace(b"'DejaVu Sans'", _PAGE_FONT.replace("'", "&apos;").encode())
    text = text.replace(b"</defs>", f"</defs>\n <style>{_dark_style()}</style>".encode(), 1)
    return "data:image/svg+xml;base64," + base64.b64encode(text).decode()


def _dark_style() -> str:
    """Rules that exchange the palette where the reader's system is dark: an image cannot see the page's own style."""
    rules = [
        f'[style*="{part}: {light}"] {{ {part}: {dark} !important }}'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    ]
    return "@media (prefers-color-scheme: dark) { " + " ".join(rules) + " }"


def png(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as a PNG file on white."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.set_facecolor("white")
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()
