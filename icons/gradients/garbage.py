"""No search for garbage while a pass is on.

A pass makes thousands of small objects, taps and what they remember, and lets go of them all at its end. Python takes
them for a sign that garbage piles up, and goes through every object of the process: a quarter of a second with a model
loaded, every ten passes, while a GPU waits.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from icons.gradients.shared_setting import SharedSetting


@contextmanager
def _paused() -> Iterator[None]:
    former = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if former:
            gc.enable()


no_collection = SharedSetting(_paused)
