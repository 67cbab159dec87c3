"""Interruption: the signals that ask a run to end (TERM, USR1, Ctrl-C), and the status that asks to be resumed.

Light, since a command listens from its first moment, before it has imported anything that takes time.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

RESUME = 75  # EX_TEMPFAIL, which Windows has no name for: interrupted; the same line, run again, goes on
CTRL_C = 130
_SET_DEATH_SIGNAL = 1  # prctl(2)
_STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
_SIGNALS = (*_STOPPING, signal.SIGINT)


class Interruption:
    """Between `watch` and `give_back` the first signal has `ask_to_stop` called, and the second ends the process.

    SIGUSR1 is what SLURM's `--signal=USR1@SECONDS` sends ahead of the time limit. In a command (after `take_signals`)
    Ctrl-C counts too, and `ask_to_stop` is called from a thread; elsewhere, as in a notebook, it is a signal handler,
    and Ctrl-C is left alone. Outside the main thread, where no handler can be set, it does nothing.

    Attributes:
        status: the exit status for the signal that has come; None: none has.
    """

    def __init__(self, ask_to_stop: Callable[[], object]) -> None:
        self.ask_to_stop = ask_to_stop
        self.status: int | None = None
        self.former: dict[signal.Signals, Any] = {}

    def watch(self) -> None:
        if listener is not None:
            listener.watching = self
        elif threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                self.former[number] = signal.signal(number, lambda came, _: self.take(came))

    def give_back(self) -> None:
        if listener is not None and listener.watching is self:
            listener.watching = None
        while self.former:
            signal.signal(*self.former.popitem())

    def take(self, number: int) -> None:
        if self.status is not None:
            os._exit(self.status)
        self.status = status_of(number)
        self.ask_to_stop()


def status_of(number: int) -> int:
    """The exit status of a run that a signal has ended.

    >>> status_of(signal.SIGTERM), status_of(signal.SIGUSR1), status_of(signal.SIGINT)
    (75, 75, 130)
    """
    return CTRL_C if number == signal.SIGINT else RESUME


class Listener:
    """Takes a command's signals in a thread: the main thread may be inside a library, where no handler would run, or be
    waiting for a rank that has ended. While nothing is watching, a signal ends the process: nothing would be lost.

    Args:
        command: named in the line that is printed then.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.watching: Interruption | None = None
        self.reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # only then is the number written to the pipe
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self.listen, name="icons-signals", daemon=True).start()

    def listen(self) -> None:
        while taken := os.read(self.reader, 1):
            if taken[0] not in _SIGNALS:
                continue
            if self.watching is None:
                self.leave(taken[0])
            self.watching.take(taken[0])

    def leave(self, number: int) -> NoReturn:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        os.write(2, f"icons {self.command}: interrupted by {name}; run the same line again to go on\n".encode())
        os._exit(status_of(number))


listener: Listener | None = None
"""Of this process; None: it is no command."""


def take_signals(command: str) -> None:
    """Has this process, which runs one command, take its signals from now on; and end when the process ends that has
    started it as one of its ranks."""
    global listener
    if listener is None and threading.current_thread() is threading.main_thread():
        listener = Listener(command)
        os.register_at_fork(after_in_child=forget)
    if int(os.environ.get("LOCAL_RANK") or 0) > 0 and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)


def forget() -> None:
    """In a forked child, whose signals are not ours, but would be written to our pipe."""
    global listener
    if listener is not None:
        listener = None
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def ignore(_: int = 0) -> None:
    """In a data loader's worker: the signal that comes to a whole group of processes is for the run, which lets its
    workers go when it is done with them. A worker that died of it would take the run along."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
