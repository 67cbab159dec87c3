"""NAME=VALUE options, such as `--task gqa=gqa.zarr`."""

from collections.abc import Sequence


def places(words: Sequence[str]) -> list[str]:
    """Every place that NAME=PLACE options name; NAME=PLACE,PLACE names several.

    >>> places(["gqa=a.zarr,b.zarr", "s3://bucket/c.zarr"])
    ['a.zarr', 'b.zarr', 's3://bucket/c.zarr']
    """
    return [place for word in words for place in word.split("=", 1)[-1].split(",")]


def parse(pairs: Sequence[str], option: str) -> dict[str, str]:
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
            raise ValueError(f"{option} {pair}: expected NAME=VALUE, for example {option} gqa=gqa.zarr")
        if name in found:
            raise ValueError(f"{option} {pair}: {name} is given twice; expected different names")
        found[name] = value
    return found
