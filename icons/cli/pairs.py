"""NAME=VALUE options, such as `--task gqa=gqa.zarr`."""

from collections.abc import Sequence
from pathlib import Path


def parse(pairs: Sequence[str], option: str, example: str = "gqa=gqa.zarr") -> dict[str, str]:
    """NAME=VALUE options, in order.

    Raises:
        ValueError: one without a name or a value, or a name given twice.

    >>> parse(["gqa=gqa.zarr"], "--task")
    {'gqa': 'gqa.zarr'}
    """
    values: dict[str, str] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise ValueError(f"{option} {pair}: expected NAME=VALUE, for example {option} {example}")
        if name in values:
            raise ValueError(f"{option} {pair}: {name} is given twice; expected different names")
        values[name] = value
    return values


def several(value: str, option: str) -> list[str]:
    """PATH,PATH,... -> the paths. A comma in the name of something that is there belongs to the name.

    Raises:
        ValueError: nothing stands before, behind or between commas.

    >>> several("a.zarr,s3://bucket/b.zarr", "--task gqa")
    ['a.zarr', 's3://bucket/b.zarr']
    """
    parts, paths = value.split(","), list[str]()
    while parts:
        ends = range(len(parts), 0, -1)
        end = next((end for end in ends if Path(",".join(parts[:end])).exists()), 1)
        paths.append(",".join(parts[:end]))
        parts = parts[end:]
    if "" in paths:
        raise ValueError(f"{option}={value}: a path is empty; expected one before and behind each comma")
    return paths


def stores_of(pairs: Sequence[str] | None, option: str) -> dict[str, list[str]]:
    """NAME=STORE,STORE,... options: the stores of each name, one for every checkpoint."""
    return {name: several(value, f"{option} {name}") for name, value in parse(pairs or [], option).items()}


def files_of(pairs: Sequence[str] | None, option: str = "--task") -> dict[str, tuple[Path, Path | None]]:
    """NAME=FILE or NAME=FILE:IMAGES options: the data and the image folder of each name."""
    named = parse(pairs or [], option, "gqa=gqa.json:images/")
    return {name: _file_and_images(value, f"{option} {name}") for name, value in named.items()}


def _file_and_images(value: str, option: str) -> tuple[Path, Path | None]:
    """FILE or FILE:IMAGES -> the data (a file, a folder, or a pattern of files) and the image folder.

    The data end at the last colon before which something lies, so that colons in names (`C:\\gqa.json`) do no harm.

    Raises:
        FileNotFoundError: no such data.

    >>> _file_and_images(f"{__file__}:images", "--task a")[1]
    PosixPath('images')
    """
    ends = [len(value), *(at for at in range(len(value) - 1, 0, -1) if value[at] == ":")]
    for end in ends:
        if Path(value[:end]).exists() or _has_match(value[:end]):
            images = value[end + 1 :]
            return Path(value[:end]), Path(images) if images else None
    raise FileNotFoundError(f"{option}: no file {value}; expected NAME=FILE or NAME=FILE:IMAGES")


def _has_match(pattern: str) -> bool:
    """Whether a pattern of names matches a file."""
    path = Path(pattern)
    return any(sign in pattern for sign in "*?[") and any(
        True for _ in Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    )
