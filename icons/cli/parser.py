"""Words of the command line -> an options object: one jsonargparse parser from a dataclass of `icons.cli.options`.

Options may come from a YAML file (`--config`), from the command line, or both (the line wins). A field called `trainer`
stands for every flag of Lightning's Trainer (`--trainer.devices 8`).
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse
from jsonargparse import Namespace
from jsonargparse.typing import restricted_string_type

from icons.cli.option_file import LOADER
from icons.cli.tables import TABLES
from icons.cli.words import accepts, dashed, shipped_recipes, spelled

LOUDNESS = {
    "--quiet": "print warnings and results alone",
    "--verbose": "add on stderr what helps to find a fault: the options as they were understood, what is opened and "
    "read, Lightning's log, and where an error comes from",
}
"""Options of every command, taken off the line before the others are read."""


def parse(name: str, options: type, words: Sequence[str]) -> Any:
    """The options of `icons NAME` that the words ask for.

    Raises:
        SystemExit: from argparse, with status 2 for wrong usage and 0 after `--help`.
    """
    hints = get_type_hints(options)
    words = shipped_recipes(spelled(words, hints))
    parser = _parser_of(name, options)
    _check_names(parser, options, words)
    if "trainer" not in hints or {"-h", "--help"} & set(words):
        config = parser.parse_args(words)
        check_values(parser, options, config)
        return options(**own(config))
    _add_trainer(parser)
    config = parser.parse_args(words)
    check_values(parser, options, config)
    given = parser.parse_args(words, defaults=False).get("trainer") or Namespace()
    flags = vars(parser.instantiate(config).trainer)
    return options(**own(config), trainer={key: flags[key] for key in vars(given)})


def _check_names(parser: jsonargparse.ArgumentParser, options: type, words: Sequence[str]) -> None:
    """What is neither in a table nor has the form that may stand in its place, said in one line.

    Raises:
        SystemExit: with status 2.
    """
    for field in fields(options):
        if "or" not in field.metadata:
            continue
        option, known = f"--{dashed(field.name)}", TABLES[field.metadata["choices"]]()
        values = [word.removeprefix(f"{option}=") for word in words if word.startswith(f"{option}=")]
        values += [value for word, value in pairwise(words) if word == option]
        for value in values:
            if value not in known and not re.fullmatch(field.metadata["or"], value):
                parser.error(f"{option} {value}: expected one of {', '.join(known)}, or MODULE:FUNCTION")


def check_values(parser: jsonargparse.ArgumentParser, options: type, config: Namespace) -> None:
    """What a field's metadata ask of its value: `least`, a number it is not below; `pattern`, a regular expression.

    Raises:
        SystemExit: with status 2, where it is something else.
    """
    for field in fields(options):
        value, option = config.get(field.name), "--" + dashed(field.name)
        least = field.metadata.get("least")
        if least is not None and value is not None and value < least:
            parser.error(f"{option} {value}: expected {least} or more")
        if field.metadata.get("pattern") and value is not None:
            try:
                re.compile(value)
            except re.error as error:
                parser.error(f"{option} {value}: is no regular expression: {error}")


def own(config: Namespace) -> dict[str, Any]:
    return {
        name: value for name, value in vars(config).items() if name not in ("config", "trainer", "quiet", "verbose")
    }


def _parser_of(name: str, options: type) -> jsonargparse.ArgumentParser:
    """The parser of a command's own options, under their headings."""
    positional: Sequence[str] = getattr(options, "positional", ())
    parser = _Parser(
        prog=f"icons {name}",
        usage=" ".join([f"icons {name}", *(word.upper() for word in positional), "[options]"]),
        description=inspect.getdoc(options),
        formatter_class=_Help,
        parser_mode=LOADER,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options, or a recipe's name")
    for option, does in LOUDNESS.items():
        parser.add_argument(option, action="store_true", help=does)
    hints, texts = get_type_hints(options), documented(options)
    for heading, placed in headed(options).items():
        group = parser.add_argument_group(heading)
        for field in placed:
            if field.name == "trainer":
                group.add_argument("--help-trainer", action="help", help=texts["trainer"])
                continue
            required = field.default is MISSING and field.default_factory is MISSING
            hint = typed(field, hints[field.name])
            settings: dict[str, Any] = {"type": hint, "help": texts.get(field.name, ""), "metavar": _shown_as(hint)}
            settings |= {} if required else {"default": field.default}
            if field.name in positional:
                settings |= {"metavar": field.name.upper()} | ({} if required else {"nargs": "?"})
                parser.add_argument(field.name, **settings)
            else:
                group.add_argument("--" + dashed(field.name), **settings, required=required)
    return parser


def headed(options: type) -> dict[str, list[Field[Any]]]:
    """The fields under their headings: the command's own first, then the shared groups in the order of the bases."""
    own_heading = options.__name__.removesuffix("Options").lower()
    bases = [kind for kind in options.__mro__[1:] if is_dataclass(kind)]
    headings: dict[str, list[Field[Any]]] = {own_heading: [], **{kind.__doc__ or "": [] for kind in bases}}
    left = {field.name: field for field in fields(options)}
    for kind in (*bases, options):
        for name in kind.__annotations__:
            if (field := left.pop(name, None)) is not None:
                heading = own_heading if kind is options else kind.__doc__ or ""
                headings.setdefault(field.metadata.get("group", heading), []).append(field)
    run = headings.pop("run", [])
    return {heading: kept for heading, kept in [*headings.items(), ("run", run)] if kept}


def documented(options: type) -> dict[str, str]:
    """Each field's docstring, the nearest class's first."""
    texts: dict[str, str] = {}
    for kind in options.__mro__[:-1]:
        for parameter in docstring_parser.parse_from_object(kind).params:
            texts.setdefault(parameter.arg_name, filled(" ".join((parameter.description or "").split())))
    return texts


def filled(text: str) -> str:
    """A help text with what the tables say in the place of their names in braces."""
    for name in re.findall(r"(?<={)[a-z ]+(?=})", text):
        text = text.replace(f"{{{name}}}", "; ".join(f"{key}: {does}" for key, does in TABLES[name]().items()))
    return text


def typed(field: Field[Any], hint: Any) -> Any:
    """A field's annotation, narrowed to the names of the table in its metadata."""
    if "choices" not in field.metadata:
        return hint
    names: Any = Literal[tuple(TABLES[field.metadata["choices"]]())]
    if "or" not in field.metadata:
        return names
    return names | restricted_string_type("Own", f"^{field.metadata['or']}$", "a name of one's own")


def _shown_as(hint: Any) -> str:
    """What stands behind an option in the help: its choices, or a word for its kind; nothing behind a flag."""
    if choices := choices_of(hint):
        return "{" + ",".join(map(str, choices)) + "}"
    kinds = {dict: "{NAME: VALUE}", bool: "", int: "N", float: "X", Path: "PATH", str: "TEXT"}
    return next((shown for kind, shown in kinds.items() if accepts(hint, kind)), "VALUE")


def choices_of(hint: Any) -> tuple[Any, ...] | None:
    """The values that a Literal, alone or as a part of a union, names."""
    named = (get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal)
    return next(named, None)


def _add_trainer(parser: jsonargparse.ArgumentParser, defaults: Mapping[str, Any] | None = None) -> None:
    """Adds the flags of Lightning's Trainer, as `--trainer.*`."""
    from lightning import Trainer  # seconds of imports, needed only where a Trainer is

    parser.add_class_arguments(Trainer, "trainer", instantiate=False, sub_configs=True)
    parser.set_defaults({f"trainer.{flag}": value for flag, value in (defaults or {}).items()})


def trainer_help(name: str, defaults: Mapping[str, Any]) -> str:
    """The text of `icons NAME --help-trainer`: the Trainer's flags, with this command's defaults."""
    parser = jsonargparse.ArgumentParser(prog=f"icons {name}", usage=f"icons {name} [options] [--trainer.FLAG VALUE]")
    _add_trainer(parser, defaults)
    return parser.format_help()


KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "dict": "NAME: VALUE pairs"}


class _Parser(jsonargparse.ArgumentParser):
    """Says in one line what is wrong, with options as they are written."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        positional = [action.dest for action in self._actions if not action.option_strings]
        if missing := re.match(r"the following arguments are required: (.*)", message):
            message = f"missing: {', '.join(_written(name, positional) for name in missing[1].split(', '))}"
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            known = [name for action in self._actions for name in action.option_strings]
            near = get_close_matches(unknown[1], known, n=1)
            message = f"{unknown[1]}: no such option" + (f"; did you mean {near[0]}?" if near else "")
        super().error(_one_line(message, positional), ex)


def _written(name: str, positional: Sequence[str] = ()) -> str:
    """A field as it is called on the command line."""
    return name.upper() if name in positional else f"--{dashed(name)}"


def _one_line(message: str, positional: Sequence[str] = ()) -> str:
    """What jsonargparse says of a value or of a YAML file, in one line.

    >>> _one_line('Parser key "num_rows":\\n  Expected a <class \\'int\\'>. Got value: x')
    '--num-rows x: expected a whole number'
    """
    key = re.match(r'Parser key "([\w.-]+)":', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    choices = re.findall(r"typing\.Literal\[(.*?)\]", message)
    kinds = [KINDS[kind] for kind in dict.fromkeys(re.findall(r"<class '(\w+)'>", message)) if kind in KINDS]
    if key is None or value is None or not (choices or kinds):
        return " ".join(message.split())
    expected = f"one of {choices[0]}".replace("'", "") if choices else " or ".join(kinds)
    return f"{_written(key[1], positional)} {value[1]}: expected {expected}"


class _Help(jsonargparse.DefaultHelpFormatter):
    """Choices in braces, defaults behind the text, examples as they are written."""

    def _get_help_string(self, action: Any) -> str:
        text = action.help or ""
        if not action.option_strings or "default:" in text or action.default in (None, False, "==SUPPRESS=="):
            return text + (" (required)" if action.required and action.option_strings else "")
        return f"{text} (default: {str(action.default).lower()})"

    def _format_action_invocation(self, action: Any) -> str:
        if not action.option_strings:
            return action.metavar
        names = [
            name.replace("_", "-") for name in action.option_strings if not name.endswith("+")
        ]  # --dim+ is a list's
        metavar = "FILE" if action.metavar is None else action.metavar
        return ", ".join(names) + f" {metavar}".rstrip() * (action.nargs != 0)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(part if part.startswith("$") else fill(part, width, indent) for part in text.split("\n\n"))
