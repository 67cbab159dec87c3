"""What is installed only with an extra, and the line that says so."""

import importlib.util

EXTRAS = {
    "matplotlib": "report",
    "easy_vqa": "demo",
    "pyarrow": "table",
    "obstore": "s3",
    "bitsandbytes": "quantize",
    "flash_attn": "flash",
    "deepspeed": "deepspeed",
    "shtab": "completion",
}
"""Module -> the extra of icons-lightning that brings it."""


def missing(module: str, command: str = "") -> str | None:
    """What to do about a module that is not installed; None for one that no extra brings.

    A command that has an extra of its own name needs that one, which brings all of its modules.
    """
    name = module.partition(".")[0]
    if name not in EXTRAS:
        return None
    extra = command if command in EXTRAS.values() else EXTRAS[name]
    return f"needs {name}, which is not installed: pip install 'icons-lightning[{extra}]'"


def require(*modules: str, command: str = "") -> None:
    """Checks, before any work is done, that modules are installed.

    Raises:
        ValueError: one is not; names its extra.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(missing(module, command))
