"""What a command writes: never over what is not its own, and whole or not at all."""

import errno
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from icons.folder_lock import in_turn
from icons.process import is_gone, process_mark

PARTIAL, MARK = ".partial", ".icons.json"
_MARKED = re.compile(r"\.([0-9a-f]{8}-\d+-\w*)\.[0-9a-f]{32}\.partial")
Place = Path | str
Places = Mapping[str, Place | Sequence[Place] | None]
"""Option -> what was given for it."""


def check_output(
    out: Place,
    option: str = "--out",
    *,
    kind: Literal["file", "folder"],
    inputs: Places,
    searched: Places | None = None,
    ours: Callable[[Path], bool],
    overwrite: bool = False,
) -> None:
    """Refuses a place to write to, unless it is new, empty, or holds this command's own former output.

    Files are compared by device and inode, so that neither a link nor another spelling hides an input. URLs are
    compared as they are spelled; whether an object store may be written is for the store to check.

    Args:
        out: where the command would write.
        option: that named it.
        kind: of what is written there.
        inputs: what the command reads. An output neither is one of them, nor lies in one that is a folder, nor is a
            folder that one lies in.
        searched: folders that only named files are read from (images): a new output may lie in one.
        ours: whether what lies there is this command's own former output.
        overwrite: the user's word that what lies there may be replaced: an input that is a file, too, but never a
            folder that is read while it would be written.

    Raises:
        ValueError: the place is an input, in one or around one, or holds something else.
    """
    here = Path(out)
    if not is_url(out):
        _check_kind(here, option, kind)
    for given, path in flat({**inputs, **(searched or {})}):
        if is_url(out) or is_url(path):
            if str(out).rstrip("/") == str(path).rstrip("/"):
                raise ValueError(f"{option} {out}: is what {given} names; expected another place: give one")
        elif same(here, Path(path)):
            if here.is_dir():
                raise ValueError(f"{option} {out}: is the folder that {given} names; expected another place: give one")
            if not overwrite:
                raise _refusal(f"{option} {out}: is the file that {given} names")
        elif not overwrite:
            if inside(here, Path(path)) and given not in (searched or {}):
                raise _refusal(f"{option} {out}: lies in the folder {path} that {given} names")
            if inside(Path(path), here):
                raise _refusal(f"{option} {out}: is around {path}, which {given} names")
    if not is_url(out) and not overwrite and not is_empty(here) and not ours(here):
        what = f"holds {_first_entry(here)}, and is" if here.is_dir() else "is there already, and is"
        raise _refusal(f"{option} {out}: {what} no former output of this command")


def _check_kind(here: Path, option: str, kind: str) -> None:
    """Refuses a pipe or a device, a file where a folder is to be, or a folder where a file is; and a place where
    nothing can be made, before hours are spent on what would go there."""
    try:
        mode = here.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        around = next(folder for folder in here.absolute().parents if folder.exists())
        if not around.is_dir() or not os.access(around, os.W_OK | os.X_OK):
            what = "may not be written by this user, or not at all" if around.is_dir() else "is a file"
            raise ValueError(f"{option} {here}: cannot be made: {around} {what}; give another place") from None
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{option} {here}: is neither a file nor a folder; expected a {kind}: give another place")
    if stat.S_ISDIR(mode) != (kind == "folder"):
        got = "folder" if stat.S_ISDIR(mode) else "file"
        raise ValueError(f"{option} {here}: is a {got}; expected a {kind}: give another place")


def _refusal(what: str) -> ValueError:
    return ValueError(
        f"{what}; expected a new or empty place: give another, or --overwrite to write there all the same"
    )


def is_url(path: Place) -> bool:
    return "://" in str(path)


def flat(places: Places) -> Iterator[tuple[str, Place]]:
    for option, given in places.items():
        if given is not None:
            for path in [given] if isinstance(given, Path | str) else given:
                yield option, path


def same(one: Path, other: Path) -> bool:
    """Whether two paths are one file or folder; of those that do not exist yet, whether they would be."""
    try:
        return one.samefile(other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def inside(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not exist, lies somewhere below `folder`."""
    return any(same(parent, folder) for parent in Path(os.path.realpath(path)).parents)


def is_empty(here: Path) -> bool:
    """Whether nothing would be lost there. What a killed run left half-written is nothing."""
    if here.is_dir():
        return not _first_entry(here)
    return not here.exists() or here.stat().st_size == 0


def _first_entry(folder: Path) -> str:
    return min((entry.name for entry in folder.iterdir() if not is_partial(entry.name)), default="")


def is_partial(name: str) -> bool:
    """Whether a file or folder is called as what is half-written."""
    return name.startswith(".") and PARTIAL in name


def mark(folder: Path, command: str, **more: str) -> None:
    """Makes the folder, and notes in it whose output it is, before anything else is written there; what runs that were
    killed left half-written goes.

    Args:
        folder, command: which, whose.
        more: what is noted besides.
    """
    sweep_partials(folder)
    with whole_file(folder / MARK) as partial:
        partial.write_text(json.dumps({"command": command, **more}) + "\n")


def is_marked(folder: Path, command: str) -> bool:
    """Whether a folder says that this command made it."""
    return read_object(folder / MARK).get("command") == command


def read_object(file: Path) -> dict[str, Any]:
    """A small JSON file's object; an empty one for whatever is none."""
    try:
        content = json.loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def beside(path: Path, suffix: str | None = None) -> Path:
    """Where to write what will be `path`: hidden beside it, with its suffix and this process's mark."""
    suffix = path.suffix[:16] if suffix is None else suffix
    return path.with_name(f".{process_mark()}.{uuid.uuid4().hex}{PARTIAL}{suffix}")


def _is_dead_partial(name: str) -> bool:
    """Whether a file or folder is what a process that has ended, on this machine, left half-written.

    >>> _is_dead_partial(beside(Path("a.json")).name), _is_dead_partial("a.json")
    (False, False)
    """
    owner = _MARKED.search(name) if PARTIAL in name else None
    return owner is not None and is_gone(owner[1])


def sweep_partials(folder: Path) -> None:
    """Removes what processes that have ended left half-written in a folder, and nothing below it."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if _is_dead_partial(entry.name)]:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to, with its suffix; in `path`'s place when the block ends, gone when it fails.

    Readers see the old file or the new one, never a part, after a loss of power as well (unless not `durable`: for what
    is many and can be made again). Missing folders are made. A link stays: what it leads to is replaced.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder) / "new" / "a.txt") as partial:
    ...         _ = partial.write_text("whole")
    ...     (Path(folder) / "new" / "a.txt").read_text()
    'whole'
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(target)
    try:
        yield partial
        if durable:
            flush_path(partial)
        partial.replace(target)
        if durable:
            flush_path(target.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, last: str, stale: Callable[[str], bool]) -> Iterator[Path]:
    """A folder beside `path` to write to; in `path`'s place when the block ends, gone when it fails.

    Where there is a folder with something in it, file by file takes its place, and what else lies there stays.

    Args:
        path: the folder.
        last: the file that says it is whole: taken away first, put there last.
        stale: which files of a former folder, by their paths in it, do not stay, since they would be read with the new.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_partials(target.parent)
    partial = beside(target, suffix="")
    partial.mkdir()
    try:
        yield partial
        flush_tree(partial)
        with in_turn(target.parent):
            if target.is_dir() and any(target.iterdir()):
                move_into(partial, target, last, stale)
            else:
                partial.rename(target)
        flush_path(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def at_the_top(file: str) -> bool:
    """Whether a path in a folder leads into none below it.

    >>> at_the_top("config.json"), at_the_top("images/1.png")
    (True, False)
    """
    return "/" not in file


def remove(path: Path) -> None:
    """Takes away a file or a folder (a fit's checkpoint is one under DeepSpeed), if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move_into(partial: Path, target: Path, last: str, stale: Callable[[str], bool]) -> None:
    former = [file for file in target.rglob("*") if file.is_file() and stale(file.relative_to(target).as_posix())]
    (target / last).unlink(missing_ok=True)
    for file in former:
        if file.name not in (MARK, last):  # without its mark the folder would be nobody's
            file.unlink()
    for folder in {file.parent for file in former} - {target}:
        with suppress(OSError):  # somebody else's files are left there
            folder.rmdir()
    files = [path.relative_to(partial) for path in sorted(partial.rglob("*")) if path.is_file()]
    for file in sorted(files, key=lambda file: file == Path(last)):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (partial / file).replace(target / file)


def put(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all; text as UTF-8."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def flush_path(path: Path | str) -> None:
    """Makes a file's content durable, or a folder's names where its file system can say so (CIFS cannot)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if Path(path).is_dir():  # one that may be written and not read
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not Path(path).is_dir():
            raise
    finally:
        os.close(descriptor)


def flush_tree(path: Path) -> None:
    """Makes a file durable, or a folder with all that is in it."""
    for part in [path, *path.rglob("*")] if path.is_dir() else [path]:
        flush_path(part)
