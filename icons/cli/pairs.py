"""NAME=VALUE options, such as `--task gqa=gqa.zarr`."""

from collections.abc import Sequence
from pathlib import Path


def places(words: Sequence[str]) -> list[str]:
    """Every place that NAME=PLACE options name; NAME=PLACE,PLACE names several.

    >>> places(["gqa=a.zarr,b.zarr", "s3://bucket/c.zarr"])
    ['a.zarr', 'b.zarr', 's3://bucket/c.zarr']
    """
    return [place for word in words for place in word.split("=", 1)[-1].split(",")]


def parse(pairs: Sequence[str], option: str, example: str = "gqa=gqa.zarr") -> dict[str, str]:
    """NAME=VALUE options, in order.

    Raises:
        ValueError: one without a name or a value, or a name given twice.

    >>> parse(["gqa=gqa.zarr"], "--task")
    {'gqa': 'gqa.zarr'}
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise ValueError(f"{option} {pair}: expected NAME=VALUE, for example {option} {example}")
        if name in found:
            raise ValueError(f"{option} {pair}: {name} is given twice; expected different names")
        found[name] = value
    return found


def file_and_images(place: str, option: str) -> tuple[Path, Path | None]:
    """FILE or FILE:IMAGES -> the data (a file, a folder, or a pattern of files) and the image folder.

    The data end at the last colon before which something lies, so that colons in names (`C:\\gqa.json`) do no harm.

    Raises:
        FileNotFoundError: no such data.

    >>> file_and_images(f"{__file__}:images", "--task a")[1]
    PosixPath('images')
    """
    ends = [len(place), *(at for at in range(len(place) - 1, 0, -1) if place[at] == ":")]
    for end in ends:
        if Path(place[:end]).exists() or has_match(place[:end]):
            images = place[end + 1 :]
            return Path(place[:end]), Path(images) if images else None
    raise FileNotFoundError(f"{option}: no file {place}; expected NAME=FILE or NAME=FILE:IMAGES")


def has_match(pattern: str) -> bool:
    """Whether a pattern of names matches a file."""
    path = Path(pattern)
    return any(sign in pattern for sign in "*?[") and any(
        True for _ in Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    )
