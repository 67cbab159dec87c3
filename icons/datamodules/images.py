"""Images of a data file: found in a folder or an archive, decoded to RGB, squared, turned into pixel values."""

import io
import json
import tarfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoImageProcessor, CLIPImageProcessorPil

from icons.batch import Status
from icons.datamodules.conversation import ImageRef
from icons.datamodules.failed_row import FailedRowError as FailedRowError
from icons.datamodules.image_address import absolute_path, embedded, fetched, is_web
from icons.models.folder import own_code

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


class PixelMaker:
    """CLIP's pixel values, equal to the original's bit for bit: by pillow, also where torchvision is installed.

    Args:
        folder: where the image processor's settings are; one of another kind than CLIP's is used as it is.
        pad: squares images first, with the processor's mean colour, so that its centre crop loses nothing.
        trust_remote_code: whether a processor of another kind may be code of the folder's own.

    Raises:
        ValueError: it is, and may not.
    """

    def __init__(self, folder: Path, pad: bool, trust_remote_code: bool = False) -> None:
        clip = processor_kind(folder).startswith(("CLIP", "Llava"))
        kind: Any = CLIPImageProcessorPil if clip else AutoImageProcessor
        with own_code(folder):
            self.processor = kind.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.pad = pad
        self.colour = tuple(int(value * 255) for value in self.processor.image_mean)

        self.table = _value_table(self.processor) if _is_usual(self.processor) else None

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "images 3 height width"]:
        ready = [square(image, self.colour) if self.pad else image for image in images]
        if self.table is not None:
            side = self.processor.size["shortest_edge"]
            values = np.empty((len(ready), 3, side, side), dtype=np.float32)
            for image, into in zip(ready, values, strict=True):
                self.look_up(image, self.table, into)
            return torch.from_numpy(values)
        pixels: Tensor = self.processor(ready, return_tensors="pt")["pixel_values"]
        return pixels

    def look_up(
        self, image: Image.Image, table: Float[np.ndarray, "3 256"], into: Float[np.ndarray, "3 height width"]
    ) -> None:
        """What the processor makes of an image, each byte's value taken from a table instead of computed."""
        side, short = into.shape[-1], min(image.size)
        width, height = (side if length == short else int(side * length / short) for length in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), self.processor.resample)
        left, top = (width - side) // 2, (height - side) // 2
        content = np.asarray(image.crop((left, top, left + side, top + side)))
        for channel in range(3):
            np.take(table[channel], content[:, :, channel], out=into[channel], mode="clip")


def _is_usual(processor: Any) -> bool:
    """Whether an image processor resizes the shorter side, cuts the centre of that size, rescales and normalises."""
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    if not isinstance(processor, CLIPImageProcessorPil) or not all(getattr(processor, step) for step in steps):
        return False
    side = dict(processor.size).get("shortest_edge")
    return side is not None and (processor.crop_size["height"], processor.crop_size["width"]) == (side, side)


def _value_table(processor: Any) -> Float[np.ndarray, "3 256"]:
    """The processor's pixel value for each byte of each channel, as it computes it itself."""
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([every] * 3, axis=-1))
    pixels = processor(image, do_resize=False, do_center_crop=False, return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(pixels[0].reshape(3, 256), dtype=np.float32)


def processor_kind(folder: Path) -> str:
    """The class that a folder's image processor settings name.

    Raises:
        FileNotFoundError: there are none.
    """
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text())
            settings = settings if part is None else settings.get(part, {})
            return str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "CLIP")
    raise FileNotFoundError(f"{folder}: no preprocessor_config.json there; expected the image processor's settings")


def square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of this colour, as large as its longer side (LLaVA's `expand2square`).

    Raises:
        FailedRowError: TOO_LARGE, for a square of more pixels than pillow's limit.
    """
    if image.width == image.height:
        return image
    side, limit = max(image.size), Image.MAX_IMAGE_PIXELS
    if limit is not None and side**2 > limit:
        what = (
            f"an image of {image.width} x {image.height}, squared, has {side**2:,} pixels; expected at most {limit:,}"
        )
        raise FailedRowError(Status.TOO_LARGE, what)
    padded = Image.new("RGB", (side, side), colour)
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded
