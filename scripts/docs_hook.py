"""Called by mkdocs: puts each command's own help where a page says `<!-- help: NAME -->`, so that none can go stale."""

import contextlib
import io
import os
import re
from typing import Any

from icons.cli.command_line import COMMANDS, main

MARK = re.compile(r"<!-- (help|commands)(?:: ([\w -]+))? -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' event: the page's text with every mark replaced."""
    return MARK.sub(lambda mark: table() if mark[1] == "commands" else help_of(mark[2]), markdown)


def table() -> str:
    """The commands, one a line, as `icons --help` has them."""
    rows = [f"| [`icons {name}`](#icons-{name}) | {does.replace('|', chr(92) + '|')} |" for name, does in COMMANDS.items()]
    return "\n".join(["| command | does |", "|---|---|", *rows])


def help_of(command: str) -> str:
    """What `icons COMMAND --help` prints at 100 columns, as a code block."""
    os.environ["COLUMNS"] = "100"
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main([*command.split(), "--help"])
    return f"```text\n{text.getvalue().strip()}\n```"
