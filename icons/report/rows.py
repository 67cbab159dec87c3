"""Training rows as the page shows them: their text, a small picture, and where they come from."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from icons.datamodules.conversation import IMAGE
from icons.datamodules.dialects import Dialect, dialect_of, read_conversation
from icons.datamodules.failed_row import FailedRowError
from icons.datamodules.record_lists import source_of
from icons.report.page import Turn
from icons.terminal import counted

_THUMBNAIL = 216
"""Pixels of a picture's longer side: twice what the page shows, for sharp screens."""
_MAX_TEXT, _MAX_TURNS = 320, 4
_MAX_SOURCES = 12
"""Sources shown by name; the rest are one bar."""

Record = Mapping[str, Any]


def turns(record: Record, dialect: Dialect | None = None) -> list[Turn]:
    """The first turns of a record's conversation, without the image mark, long ones cut. Without a dialect it is
    read in the first one that it fits.

    >>> turns({"conversations": [{"from": "human", "value": "<image>\\nRed?"}, {"from": "gpt", "value": "Yes"}]})
    [Turn(text='Red?', answer=False), Turn(text='Yes', answer=True)]
    """
    dialect = dialect or dialect_of(record)
    if dialect is None:
        return []
    try:
        said = read_conversation(record, dialect).turns
    except FailedRowError:
        return []
    shown = []
    for turn in said[:_MAX_TURNS]:
        text = turn.text.replace(IMAGE, "").strip()
        text = text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT].rstrip() + " …"
        shown.append(Turn(text, not turn.human))
    if len(said) > _MAX_TURNS:
        shown.append(Turn(f"… and {counted(len(said) - _MAX_TURNS, 'more turn')}", False))
    return shown


def thumbnail(image: Image.Image) -> str:
    """A small JPEG of `image` as a `data:` address; transparency on white.

    >>> thumbnail(Image.new("RGB", (4, 4)))[:23]
    'data:image/jpeg;base64,'
    """
    image.draft("RGB", (_THUMBNAIL, _THUMBNAIL))  # a JPEG is decoded at a fraction of its size
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    if image.mode != "RGB":
        with_alpha = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", with_alpha.size, "white"), with_alpha).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def composition(
    rows: Int[np.ndarray, " sample"],
    selected: Bool[np.ndarray, " rows"],
    read: Callable[[int], Record | None],
    field: str | None,
) -> tuple[list[str], Float[np.ndarray, " sources"], Float[np.ndarray, " sources"]]:
    """Shares of each source among `rows` and among the selected of them, the largest in the pool first.

    Args:
        rows: rows to read; all of the pool or a sample.
        selected: which rows of the pool are selected.
        read: a row's record; None for one that cannot be read.
        field: see `source_of`.

    Returns:
        Names (the last may be "other"), shares of the pool, shares of the selection.
    """
    pool: Counter[str] = Counter()
    chosen: Counter[str] = Counter()
    for row in rows.tolist():
        record = read(row)
        source = "(unreadable)" if record is None else source_of(record, field)
        pool[source] += 1
        chosen[source] += bool(selected[row])
    names = [name for name, _ in pool.most_common(_MAX_SOURCES)]
    both = [np.array([count[name] for name in names], dtype=float) for count in (pool, chosen)]
    if len(pool) > len(names):
        names.append("other")
        both = [np.append(part, count.total() - part.sum()) for part, count in zip(both, (pool, chosen), strict=True)]
    return names, both[0] / max(pool.total(), 1), both[1] / max(chosen.total(), 1)


def flat(manifest: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    """A manifest as pairs of dotted name and text, in its own order.

    >>> flat({"projector": {"kind": "count_sketch", "dim": 8}, "dtype": "float16"})
    [('projector.kind', 'count_sketch'), ('projector.dim', '8'), ('dtype', 'float16')]
    """
    pairs: list[tuple[str, str]] = []
    for key, value in manifest.items():
        if isinstance(value, Mapping):
            pairs += flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            pairs.append((f"{prefix}{key}", ", ".join(map(str, value)) or "none"))
        else:
            pairs.append((f"{prefix}{key}", "none" if value is None else str(value)))
    return pairs
