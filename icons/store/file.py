"""A file of a store in a folder: written beside its name and then renamed, read only if it is one."""

import errno
import itertools
import os
import stat
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from icons.output import flush_path
from icons.process import process_mark

PARTIAL = ".partial"
_METADATA = "zarr.json"
_RUN, _numbers = uuid.uuid4().hex[:16], itertools.count()  # names of this process's files, which bear its mark too
Guard = Callable[[], None]
"""Called just before a file gets its name; raises to prevent it."""


class LostUnit(Exception):
    """Raised by a guard: the unit whose file was about to get its name is another run's now, or finished."""


def nothing() -> None:
    """The guard of a file that nobody else may want to write."""


def write_file(root: str, key: str, parts: Sequence[Any], *, exclusive: bool = False) -> str:
    """Writes one key below `root` and renames it into place (`exclusive`: links it, which fails if it exists).

    Raises:
        FileNotFoundError: `root` is gone.
        FileExistsError: `exclusive`, and the key exists.
        OSError: whatever the disk says (full, read-only, `exclusive` without hard links); nothing is left behind then.
    """
    path, partial = f"{root}/{key}", write_partial(root, key, parts)
    try:
        if key.endswith(_METADATA):
            flush_path(partial)
        if exclusive:
            link(partial, path)
            os.unlink(partial)
        else:
            os.replace(partial, path)
    except BaseException as error:
        remove(partial)
        raise_if_vanished(root, error)
        raise
    return path


def remove(path: str) -> None:
    """Takes a file away, if it is there."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def write_partial(root: str, key: str, parts: Sequence[Any]) -> str:
    """Writes the content of a key beside its name; its folder is made, and never `root` itself.

    Raises:
        FileNotFoundError: `root` is gone.
        OSError: as `write_file`.
    """
    folder, _, name = f"{root}/{key}".rpartition("/")
    # strings: a Path costs more than the calls that it is given to
    partial = f"{folder}/.{name}.{process_mark()}.{_RUN}{next(_numbers):016x}{PARTIAL}"
    try:
        try:
            descriptor = os.open(partial, _NEW, 0o666)
        except FileNotFoundError:
            _make_parents(Path(root), Path(folder))
            descriptor = os.open(partial, _NEW, 0o666)
        try:
            _write(descriptor, parts)
        finally:
            os.close(descriptor)
    except BaseException as error:
        remove(partial)
        raise_if_vanished(root, error)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = f"{root}/{key}"  # what goes wrong as bytes are written names no file
        raise
    return partial


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def _write(descriptor: int, parts: Sequence[Any]) -> None:
    """All parts in one go, where the system takes them: each call lets another thread go first."""
    views = (memoryview(part) for part in parts)
    left = [view.cast("B") for view in views if view.nbytes]
    while left:
        written = os.writev(descriptor, left)
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]


def link(partial: str, path: str) -> None:
    """The rename that fails if the name is taken, also when two processes try at once.

    Raises:
        FileExistsError: it is.
        OSError: the file system has no hard links.
    """
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        message = (
            f"{Path(path).parent}: this file system has no hard links, by which runs agree on who computes what; "
            "expected one that has them (ext4, XFS, NFS, Lustre): put the store there, or give an object store by its "
            "URL (s3://)"
        )
        raise OSError(error.errno, message) from error


def read_file(path: str) -> bytes | None:
    """What lies there; None: no file.

    Raises:
        ValueError: a pipe or a device.
    """
    try:
        # a pipe would be waited for without end
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        about = os.fstat(descriptor)
        if stat.S_ISDIR(about.st_mode):
            return None
        _check_regular(path, about.st_mode)
        content = os.read(descriptor, about.st_size + 1)
        while len(content) < about.st_size and (more := os.read(descriptor, about.st_size)):
            content += more
        return content
    finally:
        os.close(descriptor)


def checked_file(path: str) -> str:
    """The path, unless a pipe or a device lies there, which would be waited for without end.

    Raises:
        ValueError: one does.
        FileNotFoundError: nothing lies there.
    """
    _check_regular(path, os.stat(path).st_mode)
    return path


def _check_regular(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: is a pipe or a device; expected a file of a store")


def raise_if_vanished(root: str, error: BaseException) -> None:
    """A missing file means nothing to the user; that the whole store is missing does."""
    if isinstance(error, FileNotFoundError) and not os.path.exists(f"{root}/{_METADATA}"):
        raise vanished(root) from error


def vanished(store: Path | str) -> FileNotFoundError:
    return FileNotFoundError(f"store {store}: has vanished while it was being written; put it back, or start anew")


def make_root(root: Path) -> None:
    """Makes the store's folder and those above it; their names are durable."""
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for folder in made:
        flush_path(folder.parent)


def _make_parents(root: Path, folder: Path) -> None:
    """Makes the folders between `root` and `folder`, and never `root` itself."""
    if folder.is_dir():
        return
    if not root.is_dir():
        raise vanished(root)
    if folder != root:
        _make_parents(root, folder.parent)
        folder.mkdir(exist_ok=True)
