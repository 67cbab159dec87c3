"""Rules of one's own: a function from scores to an order of rows, given as such or by its import path."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int

from icons.consensus.rules.evidence import Evidence
from icons.terminal import counted

OwnRule: TypeAlias = Callable[[Any], Any]
"""Takes what `select` was given (on the command line a `ScoreStore`); gives rows, the best first."""


def imported(path: str) -> OwnRule:
    """The function that `module:function` names; modules in the working folder are found too.

    Raises:
        ValueError: no such module or function.
    """
    module, _, name = path.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"method {path}: there is no module {error.name!r}; expected MODULE:FUNCTION, with the module in the "
            "working folder or installed"
        ) from error
    finally:
        sys.path.remove(folder)
    if not callable(function):
        raise ValueError(f"method {path}: {module} has no function {name!r}; expected MODULE:FUNCTION")
    rule: OwnRule = function
    return rule


def name_of(rule: OwnRule) -> str:
    return f"{getattr(rule, '__module__', '?')}:{getattr(rule, '__qualname__', type(rule).__name__)}"


def ordered_by(rule: OwnRule, evidence: Evidence) -> Int[np.ndarray, " scored"]:
    """Numbers that rank rows as the rule orders them. Rows without a score, which a rule may name, are passed
    over.

    Raises:
        ValueError: what the rule gave is no order of rows: other things than row numbers, rows that are not there,
            rows named twice; it has too few; or the rule raised something itself.
    """
    what, num_rows = f"rule {name_of(rule)}", evidence.columns.num_rows
    try:
        order = np.asarray(rule(evidence.scores))
    except Exception as error:  # the user's code: whatever it raises is theirs to mend
        raise ValueError(f"{what}: raised {type(error).__name__}: {error}; ICONS_TRACEBACK=1 shows where") from error
    if order.ndim != 1 or (order.dtype.kind not in "iu" and len(order)):
        raise ValueError(
            f"{what}: gave {order.dtype} of shape {order.shape}; expected row numbers, the best first (such as "
            "np.argsort(-score) gives)"
        )
    order = order.astype(np.int64)
    beyond = order[(order < 0) | (order >= num_rows)]
    if len(beyond):
        raise ValueError(f"{what}: gave row {beyond[0]}; expected 0 to {num_rows - 1}")
    counts = np.bincount(order, minlength=num_rows)
    if (counts > 1).any():
        raise ValueError(f"{what}: gave row {int(counts.argmax())} more than once; expected each row at most once")
    free = evidence.candidates
    order = order[free[order]]
    wanted = min(evidence.wanted, int(free.sum()))
    if len(order) < wanted:
        raise ValueError(
            f"{what}: gave {counted(len(order), 'row')} that can be selected; expected {wanted:,} or more: let it "
            "order all rows, or ask for fewer"
        )
    return evidence.placed(order)
