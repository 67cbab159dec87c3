"""Locks of folders, between processes of one machine.

A network file system may lock none: there nobody is kept apart.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Waits until no other process of this machine is in such a block for the same folder, so that what is put there
    one after the other is one's or the other's, and never a mixture."""
    with ExitStack() as stack:
        with suppress(OSError):  # nor can one be locked that must not be read
            descriptor = opened(folder)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def opened(folder: Path) -> int:
    """A descriptor to lock the folder by, for the caller to close."""
    return os.open(folder, os.O_RDONLY | os.O_CLOEXEC)


def lock_alone(descriptor: int) -> bool:
    """Locks a folder for this process alone, at once; False if another has it. True, too, where none can be locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
