"""A limit on the loops of chat templates: one that does not come to its end costs a row, never the run.

Each round of a loop and each call of a macro looks at the time that this thread has computed, which a busy machine does
not change. That works in any thread and process, where a signal works in the main thread alone.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jinja2
from jinja2 import Environment, nodes
from transformers.utils import chat_template_utils

SECONDS = 1.0
"""Of computing, for one conversation: some thousand times what a template takes."""
_HERE = threading.local()


class EndlessError(jinja2.TemplateError):
    """A template computes for longer than `SECONDS`."""


@contextmanager
def ending(template: str) -> Iterator[None]:
    """Within, transformers renders `template` no longer than `SECONDS`.

    Raises:
        EndlessError: from the rendering, when the time is over.
    """
    compiled: Any = chat_template_utils._compile_jinja_template(template)  # transformers keeps it for its own use
    if not hasattr(compiled, "looks_at_the_time"):
        counted = _watched(compiled.environment, template)
        compiled.root_render_func, compiled.blocks = counted.root_render_func, counted.blocks
        compiled.looks_at_the_time = True
    _HERE.until = time.thread_time() + SECONDS
    try:
        yield
    finally:
        del _HERE.until


def _watched(environment: Environment, template: str) -> jinja2.Template:
    """The template with a look at the time in every loop and macro; writes the same."""
    tree = environment.parse(template)
    loops: Any = list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)))
    for node in loops:
        node.body.insert(0, nodes.Output([_look()]))
        if isinstance(node, nodes.For) and node.test is not None:  # what it leaves out takes time too
            node.test = nodes.And(nodes.Not(_look()), node.test)
    tree.set_environment(environment)
    return environment.from_string(tree)


def _look() -> nodes.Call:
    return nodes.Call(nodes.ImportedName(f"{__name__}.{_check_time.__name__}"), [], [], None, None)


def _check_time() -> str:
    """Nothing, which is what it writes.

    Raises:
        EndlessError: the time is over.
    """
    if time.thread_time() > getattr(_HERE, "until", float("inf")):
        raise EndlessError(f"it does not come to an end within {SECONDS:g} s of computing")
    return ""
