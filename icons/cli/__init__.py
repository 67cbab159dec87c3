"""The `icons` command."""

from icons.cli.command_line import main

__all__ = ["main"]
