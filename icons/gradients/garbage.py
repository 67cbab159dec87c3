"""No search for garbage while a pass is on.

A pass makes thousands of small objects, taps and what they remember, and lets go of them all at its end. Python takes
them for a sign that garbage piles up, and goes through every object of the process: a quarter of a second with a model
loaded, every ten passes, while a GPU waits.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class _Paused:
    """The process's collector, which all its threads share: paused by the first that asks, and as it was after the
    last."""

    def __init__(self) -> None:
        self.lock, self.users, self.former = Lock(), 0, False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not self.users:
                self.former = gc.isenabled()
                gc.disable()
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users and self.former:
                    gc.enable()


no_collection = _Paused()
