"""A benchmark's images: found by the names that its files give them, written under names that lead nowhere else."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from icons.output import put

Image = Path | Callable[[], bytes]
"""An image file, or what reads an encoded image out of a table."""


def within(folder: Path, name: object) -> Path:
    """The path of `name` in `folder`.

    Raises:
        ValueError: it is no name, or leads out of the folder: by `..`, as an absolute path, or through a link.

    >>> within(Path("images"), "coco/1.jpg").as_posix()
    'images/coco/1.jpg'
    """
    if not isinstance(name, str) or not name.strip("./\\ ") or "\0" in name:
        raise ValueError(f"image name {name!r}: expected the name of a file in {folder}")
    path, root = folder / name.replace("\\", "/"), os.path.realpath(folder)
    if ".." in path.relative_to(folder).parts if path.is_relative_to(folder) else True:
        raise ValueError(f"image name {name!r}: leads out of {folder}; expected the name of a file in it")
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise ValueError(f"image name {name!r}: is a link that leads out of {folder}; expected a file in it")
    return path


@dataclass
class PictureFolder:
    """The folder that a task's images are written to. An image that is there already is compared by its content."""

    folder: Path
    taken: dict[str, bytes] = field(default_factory=dict)
    """Name -> SHA-256 of what this build has written under it."""

    def add(self, image: Image, name: str, question: str) -> str:
        """Writes an image unless it is there; the name that it has, another one where its own is taken.

        Raises:
            FileNotFoundError: there is no such image.
            ValueError: it cannot be read, or its name leads out of the folder.
        """
        target = within(self.folder, name)
        name = target.relative_to(self.folder).as_posix()
        content = read(image, question)
        digest = hashlib.sha256(content).digest()
        if self.taken.setdefault(name, digest) != digest:  # two images of one name would show one of them twice
            name = (
                target.with_name(f"{target.stem}-{digest.hex()[:12]}{target.suffix}")
                .relative_to(self.folder)
                .as_posix()
            )
            self.taken[name], target = digest, within(self.folder, name)
        if not target.is_file() or target.read_bytes() != content:
            put(target, content)
        return name


def read(image: Image, question: str) -> bytes:
    if isinstance(image, Path) and not image.is_file():
        raise FileNotFoundError(f"question {question}: its image {image} is not there; unpack all images")
    try:
        content = image.read_bytes() if isinstance(image, Path) else image()
    except Exception as error:  # whatever a table's reader makes of a broken cell
        raise ValueError(f"question {question}: its image cannot be read ({error}); download the file again") from error
    if not isinstance(content, bytes) or not content:
        raise ValueError(f"question {question}: its image is empty; download the file again")
    return content
