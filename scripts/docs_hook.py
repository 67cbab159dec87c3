"""Called by mkdocs: fills in what would go stale if it were written by hand: commands' help, and every error message.

Marks in a page: `<!-- commands -->`, `<!-- help: NAME -->`, `<!-- messages -->`.
"""

import ast
import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from icons.cli.command_line import COMMANDS, main

MARK = re.compile(r"<!-- (commands|messages|help)(?:: ([\w -]+))? -->")
PACKAGE = Path(__file__).parent.parent / "icons"
SHORTEST = 12
"""Characters of fixed text below which a message says nothing by itself."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' event: the page's text with every mark replaced."""
    return MARK.sub(lambda mark: {"commands": table, "messages": messages, "help": help_of}[mark[1]](mark[2]), markdown)


def table(_: str | None = None) -> str:
    """The commands, one a line, as `icons --help` has them."""
    rows = [f"| [`icons {name}`](#icons-{name}) | {cell(does)} |" for name, does in COMMANDS.items()]
    return "\n".join(["| command | does |", "|---|---|", *rows])


def help_of(command: str) -> str:
    """What `icons COMMAND --help` prints at 100 columns, as a code block."""
    os.environ["COLUMNS"] = "100"
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        status = main([*command.split(), "--help"])
    assert status == 0, f"icons {command} --help ends with {status}"
    return f"```text\n{text.getvalue().strip()}\n```"


def messages(_: str | None = None) -> str:
    """Every message that the package raises, in tables by package."""
    parts = []
    for package in sorted({file.relative_to(PACKAGE).parts[0] for file in PACKAGE.rglob("*.py")}):
        files = sorted((PACKAGE / package).rglob("*.py")) if (PACKAGE / package).is_dir() else [PACKAGE / package]
        found = sorted({message for file in files for message in raised(ast.parse(file.read_text()))})
        if found:
            parts += [f"### {package.removesuffix('.py')}", "", *(f"- {line}" for line in found), ""]
    return "\n".join(parts)


def raised(tree: ast.AST) -> Iterator[str]:
    """The texts of `raise Error("...")`, with `…` where values are put in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = template(node.exc.args[0])
            if len(text.replace("…", "")) > SHORTEST:
                yield cell(re.sub(r"([<>*_`#])", r"\\\1", text))


def template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


def cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())
