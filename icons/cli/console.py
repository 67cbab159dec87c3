"""Where commands speak: one console, which also shows what the library says through `logging`."""

import logging

from rich.markup import escape

from icons.terminal import Console

console = Console()
details = Console(stderr=True)
"""For what `--verbose` adds: no output that a script reads has it between its lines."""
results = Console()
"""For what was asked for itself: `--quiet` leaves it."""


def tell(text: str, style: str | None = None) -> None:
    """Prints a line as it is; not with `--quiet`."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Prints a line that was asked for, as it is, with `--quiet` too."""
    results.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Prints a warning, with `--quiet` too."""
    results.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)


def bars() -> dict[str, bool]:
    """The Trainer's flag that takes its progress bar away, where only warnings and results are asked for."""
    return {"enable_progress_bar": False} if console.quiet else {}


class ConsoleHandler(logging.Handler):
    """The library's log on the console: warnings as such, steps as they are, details on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            warn(record.getMessage())
        elif record.levelno >= logging.INFO:
            tell(record.getMessage())
        else:
            details.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def listen(quiet: bool = False, verbose: bool = False) -> None:
    """Shows the library's log from now on: warnings alone, or also what it does, or also what helps to find a fault."""
    console.quiet = quiet
    logger = logging.getLogger("icons")
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())
