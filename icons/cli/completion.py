"""`icons --print-completion SHELL`: a script that completes commands, options and choices, made by shtab."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from icons.cli.command_line import COMMANDS, options_of
from icons.cli.parser import choices_of, typed
from icons.cli.words import accepts, dashed

_SHELLS = ("bash", "zsh", "tcsh")


def completion(shell: str) -> str:
    """The script for one of `_SHELLS`.

    Raises:
        ModuleNotFoundError: the extra `completion` is not installed.
        ValueError: another shell.
    """
    if shell not in _SHELLS:
        raise ValueError(f"--print-completion {shell!r}: expected one of {', '.join(_SHELLS)}")
    import shtab

    parser = argparse.ArgumentParser(prog="icons")
    commands = parser.add_subparsers()
    for name, does in COMMANDS.items():
        command, options = commands.add_parser(name, help=does), options_of(name)
        hints, positional = get_type_hints(options), getattr(options, "positional", ())
        for field in fields(options):
            word = field.name if field.name in positional else f"--{dashed(field.name)}"
            hint = typed(field, hints[field.name])
            action: Any = command.add_argument(word, choices=choices_of(hint), nargs="?" if hint is bool else None)
            if accepts(hint, Path):
                action.complete = shtab.FILE
    return shtab.complete(parser, shell)
