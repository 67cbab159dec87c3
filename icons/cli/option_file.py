"""Option files (`--config`): YAML whose keys are spelled as the options are, and which is not larger than it looks."""

import math
from typing import Any

import jsonargparse
import yaml

LOADER = "icons"
_LARGEST = 100_000
"""Entries of a file with its aliases written out."""


def _load(text: str) -> Any:
    """YAML whose keys may be spelled as the options are: `chunk-rows: 4`."""
    try:
        if _size_of(yaml.compose(text, Loader=yaml.SafeLoader)) > _LARGEST:
            raise yaml.YAMLError(f"has more than {_LARGEST:,} entries once its aliases are written out")
        content = jsonargparse.get_loader("yaml")(text)
    except RecursionError:
        raise yaml.YAMLError("is nested too deep") from None
    return (
        {key.replace("-", "_") if isinstance(key, str) else key: value for key, value in content.items()}
        if isinstance(content, dict)
        else content
    )


def _size_of(node: yaml.Node | None, known: dict[int, float] | None = None) -> float:
    """Entries of a YAML document with every alias written out; infinite where one holds itself."""
    known = {} if known is None else known
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1.0
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted: whoever meets it meanwhile is inside of it
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else [entry])]
        known[id(node)] = 1.0 + sum(_size_of(part, known) for part in parts)
    return known[id(node)]


jsonargparse.set_loader(LOADER, _load, exceptions=(yaml.YAMLError,))
