"""What the package's tables say, read from their source: importing them would take torch, and `--help` seconds."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def projectors() -> dict[str, str]:
    """The keys of `icons.projection.PROJECTORS`."""
    return {name: "" for name, _ in entries("projection.py", "PROJECTORS")}


def rules() -> dict[str, str]:
    """Each rule of `icons.consensus.rules.table.RULES`, with what it does."""
    return {name: ast.literal_eval(value.args[1]) for name, value in entries("consensus/rules/table.py", "RULES")}


def _rule_options() -> dict[str, str]:
    """Each rule that has options, with their defaults: the keyword parameters of its function."""
    functions = {
        node.name: node.args
        for file in sorted((PACKAGE / "consensus" / "rules").glob("*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    having = {}
    for name, value in entries("consensus/rules/table.py", "RULES"):
        arguments = functions[ast.unparse(value.args[0]).rpartition(".")[2]]
        pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        having[name] = ", ".join(f"{argument.arg}={ast.unparse(default)}" for argument, default in pairs if default)
    return {name: options for name, options in having.items() if options}


def training_formats() -> dict[str, str]:
    """Each of `icons.datamodules.training_formats.FORMATS`, with what it is."""
    table = entries("datamodules/training_formats.py", "FORMATS")
    return {name: ast.literal_eval(value.args[0]) for name, value in table}


def dialects() -> dict[str, str]:
    """Each of `icons.datamodules.dialects.DIALECTS`, with its fields; and auto."""
    table = entries("datamodules/dialects.py", "DIALECTS")
    return {"auto": "as most records are"} | {name: ast.literal_eval(value.args[1]) for name, value in table}


TABLES = {
    "projectors": projectors,
    "rules": rules,
    "rule options": _rule_options,
    "training formats": training_formats,
    "dialects": dialects,
}


def entries(file: str, table: str) -> Iterator[tuple[str, ast.Call]]:
    """The entries of a dict that a file of the package writes out."""
    for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id == table and isinstance(value, ast.Dict):
            for key, entry in zip(value.keys, value.values, strict=True):
                yield ast.literal_eval(key or ast.Constant(None)), entry  # type: ignore[misc]
