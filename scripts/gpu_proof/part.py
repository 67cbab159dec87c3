"""What a part of the proof has found, and its verdict."""

import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from icons.gradients.capture import SlowerPathWarning
from icons.preconditioner import UnfusedWarning

REHEARSED = "ran and held on the CPU, which shows nothing of a GPU"


class CannotRunError(Exception):
    """Why a part cannot run here."""


@dataclass
class Part:
    """What a part has found: figures, and for some of them the most they may be (`goals`: on a GPU alone)."""

    figures: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    goals: dict[str, float] = field(default_factory=dict)
    status: str = ""
    reason: str = ""
    seconds: float = 0.0

    def judge(self, small: bool) -> None:
        held = self.limits if small else self.limits | self.goals
        over = [f"{name} {self.figures[name]:.3g} > {most:.3g}" for name, most in held.items()
                if not self.figures[name] <= most]  # fmt: skip
        self.status, self.reason = ("failed", ", ".join(over)) if over else ("passed", "")
        if small and not over:
            self.status, self.reason = "not shown", REHEARSED


def require(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise CannotRunError(f"{package} is not installed: pip install 'icons-lightning[{extra}]'")


def run(part: Callable[[], Part], small: bool, over: bool) -> Part:
    """The part with its verdict; an error is a verdict too (its traceback is printed): others are still to run."""
    begin = time.perf_counter()
    try:
        if over:
            raise CannotRunError("the time was over: give more --minutes")
        with warnings.catch_warnings():
            for slower in (SlowerPathWarning, UnfusedWarning):
                warnings.simplefilter("error", slower)
            found = part()
        found.judge(small)
    except CannotRunError as why:
        found = Part(status="not run", reason=str(why))
    except Exception as failure:
        traceback.print_exc()
        found = Part(status="failed", reason=f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}")
    found.seconds = time.perf_counter() - begin
    if not small:
        torch.cuda.empty_cache()
    return found
