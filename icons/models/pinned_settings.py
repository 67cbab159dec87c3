"""A folder's claim: the settings that everything in it was made with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icons.agreement import differences
from icons.output import put


def claim(file: Path, settings: Mapping[str, Any], what: str) -> None:
    """Makes the folder of `file` and keeps the settings there, or checks that they are those of before.

    Args:
        file: where the settings are kept.
        settings: JSON values by name.
        what: the folder holds, for the message.

    Raises:
        ValueError: a setting differs; names the first with both values.
    """
    if file.is_file():
        former = json.loads(file.read_text())
        for name, then, now in differences(former, settings, settings):
            raise ValueError(
                f"--out {file.parent}: holds {what} with {name} {then!r}, now it is {now!r}; give another folder"
            )
    put(file, json.dumps(dict(settings), indent=1) + "\n")
