"""Where what is known of data files is kept from run to run: `$ICONS_CACHE`, or `~/.cache/icons`."""

import os
from pathlib import Path

_CACHE = "ICONS_CACHE"


def cache_folder() -> Path:
    return Path(os.environ.get(_CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "icons")
