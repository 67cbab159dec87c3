"""Marks of image files: what a run notices by that images have been replaced since what it goes on with was begun.

The data file is compared as a whole, with what it holds of images; image files beside it are far too many to be read
again. So some of them stand for all: of up to 64 rows, evenly spaced, size and checksum.
"""

import hashlib
from collections.abc import Callable, Sequence

from icons.datamodules.conversation import Conversation, ImageRef
from icons.datamodules.failed_row import FailedRowError
from icons.datamodules.image_address import embedded, is_web
from icons.datamodules.images import ImageSource

_ROWS = 64
_TRIES = 16  # rows looked at for one with an image
_MOST_BYTES = 1 << 25  # read in all, or a little more: a fraction of a second
Marks = dict[str, dict[str, str | None]]
"""Row -> image -> `SIZE-CHECKSUM`; None: it could not be read."""


def image_marks(rows: Sequence[int], conversation: Callable[[int], Conversation], images: ImageSource) -> Marks:
    """The marks of some rows' image files; the same for the same data and files.

    Images that the records bring along are part of the data file, and those on the web are kept by their addresses:
    neither is looked at.

    Args:
        rows: those that are used, ascending.
        conversation: row -> what it says; raises FailedRowError.
        images: where the files are read.
    """
    found: Marks = {}
    left, blocks = _MOST_BYTES, min(_ROWS, len(rows))
    # by turns from all over the data, so that large files leave out rows everywhere
    for block in sorted(range(blocks), key=lambda block: f"{block:06b}"[::-1]):
        start, stop = (len(rows) * end // blocks for end in (block, block + 1))
        for row in rows[start : min(stop, start + _TRIES)]:
            if names := _file_names(row, conversation):
                contents = {name: _content(name, images) for name in names}
                found[str(row)] = {
                    name: None if content is None else _mark(content) for name, content in contents.items()
                }
                left -= sum(len(content or b"") for content in contents.values())
                break
        if left <= 0:
            break
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def _file_names(row: int, conversation: Callable[[int], Conversation]) -> list[str]:
    try:
        return [image.name for image in conversation(row).images if _is_file(image)]
    except FailedRowError:
        return []


def _is_file(image: ImageRef) -> bool:
    return image.content is None and not is_web(image.name) and embedded(image.name) is None


def _content(name: str, images: ImageSource) -> bytes | None:
    try:
        return images.read(name)
    except FailedRowError:
        return None


def _mark(content: bytes) -> str:
    return f"{len(content)}-{hashlib.sha256(content).hexdigest()[:16]}"
