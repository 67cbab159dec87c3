"""Ranks: the processes of one run, which end as one."""

import atexit
import datetime
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from icons.interruption import Interruption

WORDS = 2048  # bytes of an outcome, at most
_POLL_S, _LAST_WAIT_S = 0.05, 60.0
FOREVER = datetime.timedelta(days=365)  # how long one rank may take longer than another


class Outcome(NamedTuple):
    """How one rank has ended: the exit status that it would give, and why if not 0."""

    status: int = 0
    said: str = ""


class Run:
    """One rank of a run: takes the signals while it works, and ends together with the other ranks. To be
    made by all ranks at the same point.

    Args:
        launched: processes that this one has started as ranks, in the list through which Lightning watches them.
    """

    def __init__(self, launched: "list[Any] | None" = None) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # a group of its own: on the CPU whatever computes, and without the time limit of the others
        self.group = dist.new_group(backend="gloo", timeout=FOREVER) if several else None
        self.launched = launched if launched is not None else []
        self.interruption: Interruption | None = None
        self.has_agreed = False

    def watch(self, ask_to_stop: Callable[[], object]) -> None:
        """From now on this rank works, and signals ask it to stop."""
        self.interruption = Interruption(ask_to_stop)
        self.interruption.watch()

    @property
    def stop_status(self) -> int | None:
        """The exit status that a signal has asked for; None: none has."""
        return None if self.interruption is None else self.interruption.status

    def end(self, error: Exception | None = None) -> None:
        """Waits for the other ranks; returns if all of them have done their work.

        Raises:
            Exception: the error given.
            ValueError: another rank has failed.
            SystemExit: a rank was interrupted.
        """
        outcome = self.agree(Outcome(self.stop_status or 0) if error is None else Outcome(1, str(error)))
        if error is not None:
            raise error
        if outcome.status == 1:
            raise ValueError(f"another rank of this run has ended with an error: {outcome.said}")
        if outcome.status:
            raise SystemExit(outcome.status)

    def fail(self, exception: BaseException) -> None:
        """Called when this rank's work has ended in an exception: the others go on with theirs, and then all end."""
        if self.has_agreed:
            return
        if self.interruption is None or not isinstance(exception, Exception):  # the others cannot begin, or end as well
            leave(self.launched)
            self.give_back()
            return
        if self.group is not None:
            said = f"error: {exception} (waiting for the other ranks, which go on with their work)"
            print(f"rank {dist.get_rank()}: {said}", file=sys.stderr, flush=True)
        self.agree(Outcome(1, str(exception)))

    def agree(self, mine: Outcome) -> Outcome:
        """Waits for every rank's outcome, however long it takes; the one that counts for all, the same on each. Asked
        again, this rank's own.

        An error (1) counts more than an interruption, and that more than success. A rank that has died, or died while
        it was waited for, is an error, unless this one was interrupted: then its own status counts.
        """
        if self.has_agreed:
            return mine
        self.has_agreed = True
        try:
            outcome = worst(self.gather(mine))
            release(self.launched)
        finally:
            self.give_back()
        return outcome

    def gather(self, mine: Outcome) -> list[Outcome]:
        """Every rank's outcome; where one has died, what that means for this one."""
        if self.group is None:
            return [mine]
        text = json.dumps(mine).encode()
        if len(text) > WORDS:
            text = json.dumps(Outcome(mine.status, mine.said[: WORDS // 8])).encode()
        own = torch.tensor(list(text.ljust(WORDS)), dtype=torch.uint8)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        try:
            work = dist.all_gather(parts, own, group=self.group, async_op=True)
            while not work.is_completed():  # and not `wait`, in which no signal would be taken
                time.sleep(_POLL_S)
            work.wait()
        except RuntimeError:
            return [mine if mine.status else Outcome(1, "another rank of this run has died; run the same line again")]
        return [Outcome(*json.loads(bytes(part.tolist()))) for part in parts]

    def give_back(self) -> None:
        if self.interruption is not None:
            self.interruption.give_back()


def leave(launched: list[Any]) -> None:
    """Has the ranks that this one has started end, after their unit or step: called when this one cannot go on."""
    for process in launched:
        process.send_signal(signal.SIGTERM)
    release(launched)


def release(launched: list[Any]) -> None:
    """Takes the ranks that this one has started from Lightning, which would kill all ranks, this one too, when one of
    them ends with another status than 0; they are waited for when this process ends."""
    if launched:
        atexit.register(wait_for, list(launched))
    launched.clear()


def wait_for(processes: Sequence[Any]) -> None:
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LAST_WAIT_S)


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome that counts for all.

    >>> worst([Outcome(), Outcome(75, "interrupted"), Outcome()])
    Outcome(status=75, said='interrupted')
    """
    return next(
        (outcome for outcome in outcomes if outcome.status == 1), max(outcomes, key=lambda outcome: outcome.status)
    )


def launched_by(strategy: Any) -> list[Any]:
    """The ranks that Lightning has launched from this process; the list that it watches."""
    processes = getattr(getattr(strategy, "launcher", None), "procs", [])
    return processes if isinstance(processes, list) else []


def own_signals(trainer: Trainer) -> None:
    """Keeps Lightning's signal handlers from acting beside ours.

    At SIGTERM it talks to the other ranks in the middle of whatever they do, and hangs unless all have got the signal;
    at SIGUSR1 under SLURM it writes a checkpoint of the whole model that a later run takes for its own, and requeues
    the job by itself.
    """
    connector: _SignalConnector = trainer._signal_connector
    connector.register_signal_handlers = nothing  # type: ignore[method-assign]


def nothing() -> None:
    """What Lightning registers."""
