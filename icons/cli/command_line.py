"""The `icons` command: names the stages, runs them, reports errors.

A command is a module `icons.cli.<name>` with one function of that name, and its options are a dataclass of
`icons.cli.options.<name>`. What a command needs is imported when it runs, so that every `--help` is instant.
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from icons.interruption import CTRL_C, take_signals

log = logging.getLogger(__name__)

COMMANDS = {
    "demo": "the whole method on a small real data set on a laptop CPU, ending in a table and a report page",
    "warmup": "LoRA warm-up (and, with a selection as data, the final fine-tune)",
    "factors": "Kronecker factors of the loss's curvature, for `--preconditioner kfac`",
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
    "inspect": "a few samples as the model sees them: learned tokens, images, length, failures by kind",
    "doctor": "versions, accelerator, attention kernel, disk, and a seconds-long self-test",
}
RESUMED = ("warmup", "factors", "gradients", "influence", "score")
"""Commands that a signal stops so that the same line goes on."""
_USER_ERROR, _USAGE_ERROR = 1, 2
_SHORTAGES = ("can't start new thread", "Cannot allocate memory", "not enough memory", "unable to mmap")
"""How Python and torch say that the system has given no more; neither has a class of its own for it."""
SHORTAGE = (
    "memory or processes are used up (`ulimit -v`, `ulimit -u`); what was finished is kept: run the same line again"
)
NO_ROOM = (
    "what was finished is kept: go on with a smaller --max-tokens or --batch-size, or with --gradient-checkpointing "
    "(--mixed-batches allows it), or on a GPU that nobody else uses"
)
_TAIL = (
    "icons COMMAND --help       a command's options",
    "icons --version            the version",
    "icons --print-completion   a script for shell completion, for bash, zsh or tcsh",
)


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
        print(_overview())
        return 0 if words else _USAGE_ERROR
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"icons {version('icons-lightning')}")
        return 0
    if words[0] == "--print-completion":
        return completed(words[1:])
    name = words[0]
    if name not in COMMANDS:
        print(f"icons: no command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return _USAGE_ERROR
    if argv is None and name in RESUMED:
        take_signals(name)
    from icons.cli.parser import LOUDNESS, parse, trainer_help

    loudness = {option.removeprefix("--"): option in words for option in LOUDNESS}
    words = [word for word in words if word not in LOUDNESS]
    try:
        if "--help-trainer" in words:
            print(trainer_help(name, importlib.import_module(f"icons.cli.{name}").TRAINER))
            return 0
        options: Any = parse(name, options_of(name), words[1:])
        from icons.cli.console import listen

        listen(**loudness)
        log.debug("icons %s: %s", name, options)
        return command_of(name)(options) or 0
    except SystemExit as stop:  # argparse has printed the help, or the usage error
        return int(stop.code or 0)
    except ModuleNotFoundError as error:
        from icons.cli.extras import missing

        # without a name it is no import that failed: a library says in a sentence what a flag of its own needs
        said = missing(error.name, name) if error.name else str(error)
        if said is None or os.environ.get("ICONS_TRACEBACK"):
            raise
        return _user_error(name, said)
    except KeyboardInterrupt:
        print(f"icons {name}: interrupted by Ctrl-C", file=sys.stderr)
        return CTRL_C
    except (ValueError, TypeError, OSError, MemoryError) as error:
        if os.environ.get("ICONS_TRACEBACK"):
            raise
        return _user_error(name, error if str(error) else "out of memory")
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" and not os.environ.get("ICONS_TRACEBACK"):  # torch's, of a GPU
            sentences = str(error).strip().partition(" Including")[0].partition(" If reserved")[0].partition("\n")[0]
            return _user_error(name, f"{sentences.rstrip('.')}: {NO_ROOM}")
        if os.environ.get("ICONS_TRACEBACK") or not any(words in str(error) for words in _SHORTAGES):
            raise
        said = str(error).strip().partition("\n")[0]
        return _user_error(name, f"{said}: {SHORTAGE}")
    except Exception as error:  # safetensors has a word of its own for what the disk says
        if os.environ.get("ICONS_TRACEBACK") or type(error).__name__ != "SafetensorError" or "I/O" not in str(error):
            raise
        return _user_error(name, f"{error}: mend the cause, and run the same line again")


def _user_error(name: str, error: object) -> int:
    log.debug("where this comes from:", exc_info=sys.exc_info()[1])
    from icons.terminal import legible  # rich, which `icons --help` does without

    print(legible(f"icons {name}: error: {error}"), file=sys.stderr)
    return _USER_ERROR


def call(name: str, **options: Any) -> int:
    """Runs a command in this process by the names of its options; its exit status.

    Raises:
        TypeError: it has no such option, or one is missing.
    """
    return command_of(name)(options_of(name)(**options)) or 0


def options_of(name: str) -> type:
    """The dataclass of a command's options."""
    return getattr(importlib.import_module(f"icons.cli.options.{name}"), f"{name.capitalize()}Options")


def command_of(name: str) -> Callable[[Any], int | None]:
    return getattr(importlib.import_module(f"icons.cli.{name}"), name)


def completed(words: Sequence[str]) -> int:
    """Prints the completion script for a shell."""
    from icons.cli.completion import completion
    from icons.cli.extras import missing

    try:
        print(completion("".join(words)))
    except ModuleNotFoundError as error:
        return _user_error("--print-completion", missing(error.name or "") or error)
    except ValueError as error:
        print(f"icons: error: {error}", file=sys.stderr)
        return _USAGE_ERROR
    return 0


def _overview() -> str:
    """The text of `icons --help`: the commands in the order of the method."""
    lines = [f"  {name:<10} {does}" for name, does in COMMANDS.items()]
    head = "usage: icons COMMAND [options]\n\nPick the training data a vision-language model really needs.\n\ncommands:"
    return "\n".join([head, *lines, "", *_TAIL])
