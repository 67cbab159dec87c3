"""The `icons` command: names the stages, builds each one's options from its function's signature, reports errors.

A command is a module `icons.cli.<name>` with one function of that name; its parameters are the options, its
docstring the help. Options may come from a YAML file (`--config`), from the command line, or both (the line wins).
A parameter called `trainer` stands for every flag of Lightning's Trainer (`--trainer.devices 8`).
"""

import importlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import jsonargparse

COMMANDS = {
    "demo": "the whole method on a small real data set on a laptop CPU, ending in a table and a report page",
    "warmup": "LoRA warm-up (and, with a selection as data, the final fine-tune)",
    "gradients": "per-sample gradients of a data file -> a gradient store; resumes by itself",
    "influence": "gradient stores -> a score store [rows, tasks]",
    "score": "model and data -> a score store directly: exact, no projection, no gradient store",
    "validate": "does influence predict? retraining on subsets, with intervals",
    "select": "score store -> selected rows, and the selected part of the data file",
    "compare": "overlap of two selections, and of their tasks",
    "report": "score store and selection -> HTML page with plots",
    "tasks": "`tasks build NAME`: a benchmark's own files -> a task's validation file; `tasks list`",
    "export": "merged Hugging Face folder, or LLaVA's original layout, for evaluation",
    "status": "rows done, failed and missing in a store, and its provenance",
    "verify": "checksums of a store, and its agreement with its manifest",
    "doctor": "versions, accelerator, attention kernel, disk, and a seconds-long self-test",
}
USER_ERROR, USAGE_ERROR = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Args:
        argv: the words after `icons`; default `sys.argv[1:]`.

    Returns:
        0: all of the work was done. 1: something the user can mend, said in one line on stderr. 2: wrong usage.
        Further codes are named by the command's help (75: interrupted, run the same line again to resume).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else USAGE_ERROR
    if words[0] == "--version":
        print(f"icons {importlib.metadata.version('icons-lightning')}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        print(f"icons: no command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return USAGE_ERROR
    module = importlib.import_module(f"icons.cli.{name}")
    command, positional = getattr(module, name), getattr(module, "POSITIONAL", ())
    try:
        options = parse(name, command, positional, words[1:])
    except SystemExit as stop:  # argparse has printed the help, or the usage error
        return int(stop.code or 0)
    try:
        return command(**options) or 0
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("ICONS_TRACEBACK"):
            raise
        print(f"icons {name}: error: {error}", file=sys.stderr)
        return USER_ERROR


def overview() -> str:
    """The text of `icons --help`: the commands in the order of the method."""
    lines = [f"  {name:<10} {does}" for name, does in COMMANDS.items()]
    head = "usage: icons COMMAND [options]\n\nPick the training data a vision-language model really needs.\n\ncommands:"
    return "\n".join([head, *lines, "", "icons COMMAND --help shows a command's options."])


def parse(
    name: str, command: Callable[..., int | None], positional: Sequence[str], words: Sequence[str]
) -> dict[str, Any]:
    """Turns the words of the command line into the keyword arguments of `command`.

    Raises:
        SystemExit: from argparse, with status 2 for wrong usage and 0 after `--help`.
    """
    parser = jsonargparse.ArgumentParser(
        prog=f"icons {name}",
        usage=" ".join([f"icons {name}", *(word.upper() for word in positional), "[options]"]),
        formatter_class=DashFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options, or a recipe's name")
    hints = get_type_hints(command)
    for parameter in positional:
        optional = inspect.signature(command).parameters[parameter].default is not inspect.Parameter.empty
        parser.add_argument(parameter, type=hints[parameter], nargs="?" if optional else None)
    parser.add_function_arguments(command, as_positional=False, skip={*positional, "trainer"})
    words = shipped_recipes(words)
    words = gather_lists(words, [key for key, hint in hints.items() if accepts(hint, list)])
    words = dashes_to_underscores(spell_flags(words, [key for key, hint in hints.items() if accepts(hint, bool)]))
    if "trainer" not in hints:
        return without_config(parser.parse_args(words))
    from lightning import Trainer  # ten seconds of imports, needed only where a Trainer is

    parser.add_class_arguments(Trainer, "trainer", instantiate=False, sub_configs=True)
    config = parser.parse_args(words)
    given = parser.parse_args(words, defaults=False).get("trainer", {})
    flags = vars(parser.instantiate(config).trainer)
    return without_config(config) | {"trainer": {key: flags[key] for key in vars(given)} if given else {}}


def without_config(config: jsonargparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(config).items() if key not in ("config", "trainer")}


def shipped_recipes(words: Sequence[str]) -> list[str]:
    """`--config NAME` is a recipe of the package (`icons/configs/NAME.yaml`) unless there is a file of that name."""
    found = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    for place, word in enumerate(found[1:], start=1):
        recipe = Path(__file__).parent.parent / "configs" / f"{word}.yaml"
        if found[place - 1] == "--config" and not Path(word).is_file() and recipe.is_file():
            found[place] = str(recipe)
    return found


def accepts(hint: Any, kind: type) -> bool:
    """Whether an annotation takes `kind`: `list` for `list[str]` and for `list[str] | None`."""
    return hint is kind or get_origin(hint) is kind or any(accepts(part, kind) for part in get_args(hint))


def dashes_to_underscores(words: Sequence[str]) -> list[str]:
    """Options are typed with dashes and are Python names inside; values keep theirs.

    >>> dashes_to_underscores(["--chunk-rows=8", "--out", "my-store"])
    ['--chunk_rows=8', '--out', 'my-store']
    """
    option = re.compile(r"^--[A-Za-z][\w.-]*")
    return [option.sub(lambda match: "--" + match[0][2:].replace("-", "_"), word) for word in words]


def gather_lists(words: Sequence[str], lists: Sequence[str]) -> list[str]:
    """Collects a repeated option into one JSON list, so that `--task a=1 --task b=2` gives two tasks.

    >>> gather_lists(["--task", "a=1", "--out", "o", "--task=b=2"], ["task"])
    ['--out', 'o', '--task=["a=1", "b=2"]']
    """
    rest: list[str] = []
    gathered: dict[str, list[str]] = {}
    stream = iter(words)
    for word in stream:
        option, equals, value = word.partition("=")
        key = option[2:].replace("-", "_")
        if not option.startswith("--") or key not in lists:
            rest.append(word)
            continue
        value = value if equals else next(stream, "")
        gathered.setdefault(key, []).extend(json.loads(value) if value.startswith("[") else [value])
    return rest + [f"--{key}={json.dumps(values)}" for key, values in gathered.items()]


def spell_flags(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A flag without a value means true: `--strict` is `--strict=true`.

    >>> spell_flags(["--strict", "--out", "o", "--dry-run", "false"], ["strict", "dry_run"])
    ['--strict=true', '--out', 'o', '--dry-run=false']
    """
    spelled: list[str] = []
    stream = list(words)
    while stream:
        word = stream.pop(0)
        if word.startswith("--") and word[2:].replace("-", "_") in flags:
            given = stream and stream[0].lower() in ("true", "false", "yes", "no")
            word += "=" + (stream.pop(0) if given else "true")
        spelled.append(word)
    return spelled


class DashFormatter(jsonargparse.DefaultHelpFormatter):
    """Shows options as people type them: `--chunk-rows`."""

    def _format_action_invocation(self, action: Any) -> str:
        return re.sub(r"--[\w.]+", lambda match: match[0].replace("_", "-"), super()._format_action_invocation(action))
