"""Records what a store does to its folder, and makes from it the folders that a loss of power may leave.

What survives: a file's bytes as they were at its last `fsync`, or any part of those written later; a name as it was
when its folder was last made durable, with any further changes to it in their order, up to some point.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Event = tuple[Any, ...]


class Recording:
    """Every change below a folder, in order: `("names", folder, {name: file or None})` gives and takes names at once,
    `("bytes", file, content)` makes a file's bytes durable, `("folder", str(path))` a folder's names."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.events: list[Event] = []
        self.written: dict[int, bytes] = {}  # inode -> what was written to it, durable or not

    def inside(self, path: Any) -> bool:
        return str(path).startswith(self.root)

    def name(self, path: Any, inode: int | None, former: Any = None) -> None:
        """`path` is the name of a file now (None: of none any more), which was `former`'s."""
        folders: dict[str, dict[str, int | None]] = {}
        for given, file in ((former, None), (path, inode)):
            if given is not None and self.inside(given):
                folder, name = os.path.split(str(given))
                folders.setdefault(folder, {})[name] = file
        self.events += [("names", folder, names) for folder, names in folders.items()]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Records in this process while the block runs."""
        kept = {name: getattr(os, name) for name in ("replace", "link", "unlink", "mkdir", "fsync")}

        def keep(path: Any) -> int:
            inode = Path(path).stat().st_ino
            self.written[inode] = Path(path).read_bytes() if Path(path).is_file() else b""
            return inode

        def replace(source: Any, target: Any) -> None:
            inode = keep(source) if self.inside(source) else None
            kept["replace"](source, target)
            self.name(target, inode, former=source)

        def link(source: Any, target: Any, **options: Any) -> None:
            kept["link"](source, target, **options)
            self.name(target, keep(source))

        def unlink(path: Any, **options: Any) -> None:
            kept["unlink"](path, **options)
            self.name(path, None)

        def mkdir(path: Any, *rest: Any, **options: Any) -> None:
            kept["mkdir"](path, *rest, **options)
            self.name(path, -1)

        def fsync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            content = Path(path).read_bytes() if Path(path).is_file() else None
            kept["fsync"](descriptor)
            if self.inside(path):
                self.events.append(
                    ("folder", str(path)) if content is None else ("bytes", os.fstat(descriptor).st_ino, content)
                )

        for name, own in (("replace", replace), ("link", link), ("unlink", unlink), ("mkdir", mkdir), ("fsync", fsync)):
            setattr(os, name, own)
        try:
            yield
        finally:
            for name, original in kept.items():
                setattr(os, name, original)

    def cut(self, length: int, out: Path, choose: random.Random) -> None:
        """The folder after power was lost when `length` changes had been made."""
        events = self.events[:length]
        durable: dict[int, bytes] = {event[1]: event[2] for event in events if event[0] == "bytes"}
        names: dict[str, dict[str, int | None]] = {}
        pending: dict[str, list[dict[str, int | None]]] = {}
        for event in events:
            if event[0] == "names":
                pending.setdefault(event[1], []).append(event[2])
            elif event[0] == "folder":
                for change in pending.pop(event[1], []):
                    names.setdefault(event[1], {}).update(change)
        for folder, changes in pending.items():
            for change in changes[: choose.randint(0, len(changes))]:
                names.setdefault(folder, {}).update(change)
        self.build(self.root, out, names, durable, choose)

    def build(self, folder: str, out: Path, names: Any, durable: dict[int, bytes], choose: random.Random) -> None:
        out.mkdir(parents=True)
        for name, inode in names.get(folder, {}).items():
            if inode == -1:
                self.build(f"{folder}/{name}", out / name, names, durable, choose)
            elif inode is not None:
                later = self.written.get(inode, b"")
                (out / name).write_bytes(durable.get(inode, later[: choose.choice([0, 0, len(later) // 2])]))
