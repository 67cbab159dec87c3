"""Interruption: SIGTERM (preemption, SLURM's time limit) as a run takes it, and the status that asks to be resumed."""

import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

RESUME = 75  # EX_TEMPFAIL, which Windows has no name for: interrupted; the same line, run again, goes on


class Interruption:
    """Has `ask_to_stop` called at SIGTERM, between `watch` and `give_back`.

    In place of Lightning's handler, which talks to the other ranks in the middle of whatever they do, and so hangs
    unless all of them have got the signal. Outside the main thread, where no handler can be set, it does nothing.
    """

    def __init__(self, ask_to_stop: Callable[[], object]) -> None:
        self.ask_to_stop = ask_to_stop
        self.former: Any = None

    def watch(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.former = signal.signal(signal.SIGTERM, lambda *_: self.ask_to_stop())

    def give_back(self) -> None:
        if self.former is not None:
            signal.signal(signal.SIGTERM, self.former)
            self.former = None


def interrupted_status(trainer: Trainer) -> int:
    """The exit status of an interrupted rank: `RESUME`; 0 for one that Lightning launched, since Lightning kills all
    ranks when one of its own ends with another status."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return 0 if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0 else RESUME


def child_processes(trainer: Trainer) -> list[Any]:
    """The ranks that Lightning has launched from this process."""
    return list(getattr(trainer.strategy.launcher, "procs", []))
