"""Addresses of images: data URLs, base64, `file://` and absolute paths, http(s)."""

import base64
import binascii
import hashlib
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path, PurePosixPath, PureWindowsPath

from icons.batch import Status
from icons.datamodules.failed_row import FailedRowError
from icons.datamodules.records.cache import cache_folder
from icons.output import whole_file

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
MOST_BYTES, _TIMEOUT_S, _BLOCK = 1 << 27, 30, 1 << 20


def embedded(name: str) -> bytes | None:
    """The image that a name itself is: a data URL, or base64 of 64 letters or more; None if it is another name.

    Raises:
        FailedRowError: IMAGE_BROKEN, for a data URL that is not base64.
    """
    head, comma, content = name.partition(",")
    if name.startswith("data:"):
        if not comma or not head.endswith(";base64"):
            raise FailedRowError(Status.IMAGE_BROKEN, f"image {name[:40]}…: a data URL that is not base64")
    elif _BASE64.fullmatch(name) and "." not in name:
        content = name
    else:
        return None
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError):
        if name.startswith("data:"):
            raise FailedRowError(Status.IMAGE_BROKEN, f"image {name[:40]}…: not valid base64") from None
        return None


def absolute_path(name: str) -> Path | None:
    """The path that a name is, if it is an absolute one, or a `file://` address; None else.

    >>> absolute_path("file:///data/a%20b.png"), absolute_path("coco/1.jpg")
    (PosixPath('/data/a b.png'), None)
    """
    if name.startswith("file://"):
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(name).path))
    known = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    return Path(name) if known and "\0" not in name else None


def is_web(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def fetched(name: str) -> bytes:
    """An image from the web, by way of the cache folder: asked for once.

    Raises:
        FailedRowError: IMAGE_MISSING, if it does not come; TOO_LARGE, above 128 MB.
    """
    kept = cache_folder() / "images" / hashlib.sha256(name.encode()).hexdigest()
    if kept.is_file():
        return kept.read_bytes()
    try:
        with urllib.request.urlopen(name, timeout=_TIMEOUT_S) as answer:
            content: bytes = answer.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise FailedRowError(Status.IMAGE_MISSING, f"image {name[:200]}: {error}") from None
    if len(content) > MOST_BYTES:
        raise FailedRowError(Status.TOO_LARGE, f"image {name[:200]}: above {MOST_BYTES >> 20} MB")
    with whole_file(kept) as partial:
        partial.write_bytes(content)
    return content
