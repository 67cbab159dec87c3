"""Options of `icons demo`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Runs the method on easy-VQA: data, warm-up, gradients, influence, selection, fine-tunes, report.

    $ icons demo

    A few minutes on 2 CPU cores, without a network. Every stage is a public command, called in this process and
    printed as the line that would repeat it. The same line, run again, goes on where it was interrupted. Needs the
    extra `demo`.
    """

    out: Path = Path("demo")
    """folder for everything that is made: a new one, or an earlier demo's"""
    seeds: int = 3
    """random subsets to compare the selection with"""
    quick: bool = False
    """a small pool and short trainings, to see the stages; the numbers then mean nothing"""
    overwrite: bool = False
    """write --out even if it holds something other than an earlier demo"""
