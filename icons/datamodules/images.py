"""Images of a data file: found in a folder or an archive, decoded to RGB."""

import io
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from icons.batch import Status
from icons.datamodules.conversation import ImageRef
from icons.datamodules.failed_row import FailedRowError as FailedRowError
from icons.datamodules.image_address import absolute_path, embedded, fetched, is_web

_ARCHIVES = (".tar", ".zip")
Image.init()
# pillow opens more by itself, one of them with Ghostscript; AVIF only where its library was built in
_KNOWN = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
_FORMATS: list[str] = [name for name in _KNOWN if name in Image.OPEN]
MAX_FILE_BYTES = 1 << 29
"""Of an encoded image, in an archive as well as beside one: more than any of pillow's largest has uncompressed."""
_MAX_RATIO = 500
"""Of an image's sides: processors resize by the shorter one, and a line of pixels becomes gigabytes."""


class ImageSource:
    """Image files by the names that records give them.

    The source is a folder, a `.tar` or `.zip` file, or a folder with such archives in it: `coco/train2017/1.jpg` is
    also found in `coco/train2017.zip` or `coco.tar`, with or without the archive's own name as a folder inside.
    Archives are read in place. A name never leads out of the folder, neither by `..` nor by a link.

    A name may also be an absolute path or a `file://` address inside the source, a data URL or base64; and, if asked
    for, a path in other folders, or an address on the web.

    Args:
        source: folder or archive; None: no images, every lookup of a name fails.
        allowed: further folders that absolute paths may lie in.
        web: fetch http(s) addresses, once, into the cache folder.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: the source is a file, and neither an uncompressed tar nor a zip.
    """

    def __init__(self, source: Path | None, allowed: Sequence[Path] = (), web: bool = False) -> None:
        self.source = None if source is None else Path(source)
        self.archives: dict[Path, Archive | None] = {}
        self.allowed, self.web = [Path(folder).resolve() for folder in allowed], web
        if self.source is None:
            return
        if not self.source.exists():
            raise FileNotFoundError(f"{source}: no such image folder; expected a folder, a .tar or a .zip")
        if self.source.is_file():
            self.archives[self.source] = Archive(self.source)
        self.root = self.source.resolve()

    def open(self, image: ImageRef | str) -> Image.Image:
        """The image as RGB, see `read` and `decode`."""
        image = ImageRef(image) if isinstance(image, str) else image
        return decode(self.read(image.name) if image.content is None else image.content, image.name)

    def read(self, name: str) -> bytes:
        """The file's bytes.

        Raises:
            FailedRowError: IMAGE_MISSING, if there is none of this name inside the source; IMAGE_BROKEN, if it cannot
                be read; TOO_LARGE, for more bytes than an image has.
        """
        if (content := embedded(name)) is not None:
            return content
        if is_web(name):
            if not self.web:
                raise FailedRowError(Status.IMAGE_MISSING, f"image {name} is on the web; --web-images fetches it")
            return fetched(name)
        if (path := absolute_path(name)) is not None:
            return self.at(path)
        if self.source is None:
            raise FailedRowError(Status.IMAGE_MISSING, f"image {name}: no image folder was given")
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or "\0" in name or ".." in parts or parts[0] == "/":
            raise FailedRowError(Status.IMAGE_MISSING, f"image {name!r} is not a name inside {self.source}")
        try:
            data = self.in_archive(self.source, parts) if self.source.is_file() else self.in_folder(parts)
        except (OSError, zipfile.BadZipFile, tarfile.TarError, ValueError, RuntimeError, NotImplementedError) as error:
            raise FailedRowError(Status.IMAGE_BROKEN, f"image {name}: {error}") from None
        if data is None:
            raise FailedRowError(Status.IMAGE_MISSING, f"image {name} is not in {self.source}")
        return data

    def at(self, path: Path) -> bytes:
        """The file at an absolute path, if it lies in the source or in an allowed folder, links followed."""
        roots = [*self.allowed, *([] if self.source is None or self.source.is_file() else [self.root])]
        try:
            real = path.resolve()
            if not any(real.is_relative_to(root) for root in roots):
                raise FailedRowError(Status.IMAGE_MISSING, f"image {path} is outside of --images; see --allow-paths")
            if not real.is_file():
                raise FailedRowError(Status.IMAGE_MISSING, f"image {path} is not there")
            _check_bytes(real.stat().st_size, path.name)
            return real.read_bytes()
        except (OSError, ValueError, RuntimeError) as error:
            raise FailedRowError(Status.IMAGE_BROKEN, f"image {path}: {error}") from None

    def in_folder(self, parts: tuple[str, ...]) -> bytes | None:
        assert self.source is not None
        path = self.source.joinpath(*parts)
        if path.is_file():
            if not path.resolve().is_relative_to(self.root):
                return None
            _check_bytes(path.stat().st_size, path.name)
            return path.read_bytes()
        for depth in range(len(parts) - 1, 0, -1):
            for suffix in _ARCHIVES:
                archive = self.source.joinpath(*parts[:depth]).with_name(parts[depth - 1] + suffix)
                if archive not in self.archives:
                    inside = archive.is_file() and archive.resolve().is_relative_to(self.root)
                    self.archives[archive] = Archive(archive) if inside else None
                content = self.in_archive(archive, parts[depth:])
                if content is None:
                    content = self.in_archive(archive, parts[depth - 1 :])
                if content is not None:
                    return content
        return None

    def in_archive(self, path: Path, parts: tuple[str, ...]) -> bytes | None:
        archive = self.archives[path]
        return None if archive is None else archive.read("/".join(parts))

    def __getstate__(self) -> dict[str, Any]:
        kept = {
            path: None if archive is None else Archive(path, archive.members) for path, archive in self.archives.items()
        }
        return self.__dict__ | {"archives": kept}


class Archive:
    """Members of a tar or zip file by name; opened anew for each read, so that workers share nothing but the table.

    Raises:
        ValueError: neither an uncompressed tar nor a zip.
    """

    def __init__(self, path: Path, members: dict[str, Any] | None = None) -> None:
        self.path = path
        self.members: dict[str, Any] = self.table() if members is None else members

    def table(self) -> dict[str, Any]:
        """Name -> the zip's entry, or offset and size in the tar."""
        if zipfile.is_zipfile(self.path):
            with zipfile.ZipFile(self.path) as opened:
                return {_plain(entry.filename): entry for entry in opened.infolist() if not entry.is_dir()}
        try:
            with tarfile.open(self.path, "r:") as opened:
                return {_plain(member.name): (member.offset_data, member.size) for member in opened if member.isreg()}
        except tarfile.TarError as error:
            raise ValueError(
                f"{self.path}: {error}; expected a folder, a .zip, or an uncompressed .tar (unpack a .tar.gz, or "
                "`gunzip` it: its members cannot be reached one by one)"
            ) from None

    def read(self, name: str) -> bytes | None:
        member = self.members.get(name)
        if member is None:
            return None
        _check_bytes(member.file_size if isinstance(member, zipfile.ZipInfo) else member[1], name)
        if isinstance(member, zipfile.ZipInfo):
            return _read_zipped(self.path, member)
        offset, size = member
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _read_zipped(path: Path, entry: zipfile.ZipInfo) -> bytes:
    """One member, without reading the archive's directory again (of 100,000 members, for one of them)."""
    with path.open("rb") as file, zipfile.ZipFile(io.BytesIO(_EMPTY_ZIP)) as opened:
        opened.fp = file
        return opened.read(entry)


_EMPTY_ZIP = b"PK\x05\x06" + bytes(18)


def _check_bytes(size: int, name: str) -> None:
    if size > MAX_FILE_BYTES:
        raise FailedRowError(Status.TOO_LARGE, f"image {name}: has {size:,} bytes; expected at most {MAX_FILE_BYTES:,}")


def _plain(name: str) -> str:
    return name.removeprefix("./").lstrip("/")


def decode(content: bytes, name: str) -> Image.Image:
    """The image as RGB: palettes and CMYK converted, 16 bits per channel reduced to 8, the first frame of several.

    Where the original clips 16-bit grey to white, the high byte is kept.

    Raises:
        FailedRowError: TOO_LARGE, for more pixels than pillow's limit (89 million), or a side 500 times the other;
            IMAGE_BROKEN, if it cannot be decoded to its end, or is of a format that is not read.
    """
    if not content:
        raise FailedRowError(Status.IMAGE_BROKEN, f"image {name} is an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata and palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                _check_sides(image, name)
                if image.mode.startswith("I"):
                    grey = np.asarray(image).astype(np.int64)
                    return Image.fromarray((grey >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
                return image.convert("RGB")
    except FailedRowError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise FailedRowError(Status.TOO_LARGE, f"image {name}: {error}") from None
    except UnidentifiedImageError:
        raise FailedRowError(Status.IMAGE_BROKEN, f"image {name}: is no image, or of an unknown format") from None
    except Exception as error:  # pillow's decoders raise whatever a broken file leads them to
        raise FailedRowError(Status.IMAGE_BROKEN, f"image {name}: {error}") from None


def _check_sides(image: Image.Image, name: str) -> None:
    short, long = sorted(image.size)
    if long > _MAX_RATIO * short:
        raise FailedRowError(
            Status.TOO_LARGE,
            f"image {name}: is {image.width} x {image.height}; expected sides of at most 1 : {_MAX_RATIO}",
        )
