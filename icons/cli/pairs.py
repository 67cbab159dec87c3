"""NAME=VALUE options, such as `--task gqa=gqa.zarr`."""

from collections.abc import Sequence


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
