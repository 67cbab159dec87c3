"""The `icons` command."""

from icons.cli.command_line import call, main

__all__ = ["call", "main"]
