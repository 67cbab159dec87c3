"""Words of the command line as they are written -> as jsonargparse takes them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from icons.cli.tables import PACKAGE


def shipped_recipes(words: Sequence[str]) -> list[str]:
    """`--config NAME` is a recipe of the package (`icons/configs/NAME.yaml`) unless there is a file of that name."""
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    for position, word in enumerate(parts[1:], start=1):
        recipe = PACKAGE / "configs" / f"{word}.yaml"
        if parts[position - 1] == "--config" and not Path(word).is_file() and recipe.is_file():
            parts[position] = str(recipe)
    return parts


def dashed(name: str) -> str:
    return name.replace("_", "-")


def spelled(words: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """The words as jsonargparse takes them: a repeated option is one JSON list, a flag alone is true, and names have
    the dashes or underscores that they are registered with.

    >>> spelled(["--task", "a=1", "--dry_run", "--task=b=2"], {"task": list[str], "dry_run": bool})
    ['--dry-run=true', '--task=["a=1", "b=2"]']
    """
    rest: list[str] = []
    gathered: dict[str, list[Any]] = {}
    stream = list(words)
    while stream:
        word = stream.pop(0)
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not re.match(r"--[A-Za-z]", option):
            rest.append(word)
        elif name in hints and accepts(hints[name], list):
            value = value if equals else stream.pop(0) if stream else ""
            gathered.setdefault(name, []).extend(listed(value))
        elif name in hints:
            if hints[name] is bool and not equals:
                known = stream and stream[0].lower() in ("true", "false", "yes", "no")
                equals, value = "=", stream.pop(0) if known else "true"
            rest.append(f"--{dashed(name)}{equals}{value}")
        else:
            # --trainer.max_steps and the like go into objects, whose names have underscores
            rest.append(f"--{name if '.' in name or name == 'print_config' else dashed(name)}{equals}{value}")
    return rest + [f"--{dashed(name)}={json.dumps(values)}" for name, values in gathered.items()]


def listed(value: str) -> list[Any]:
    """One value of a repeated option, or a JSON list of several.

    >>> listed("a=1"), listed('["a=1", "b=2"]'), listed("[a=b")
    (['a=1'], ['a=1', 'b=2'], ['[a=b'])
    """
    try:
        values = json.loads(value) if value.startswith("[") else value
    except json.JSONDecodeError:
        values = value
    return values if isinstance(values, list) else [values]


def accepts(hint: Any, kind: type) -> bool:
    """Whether an annotation takes `kind`: `list` for `list[str]` and for `list[str] | None`."""
    return hint is kind or get_origin(hint) is kind or any(accepts(part, kind) for part in get_args(hint))
