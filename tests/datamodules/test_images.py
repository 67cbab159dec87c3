"""Images: whatever lies in a folder or archive is decoded rightly, or fails its row with the reason."""

import base64
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from icons.batch import Status
from icons.datamodules.images import FailedRowError, ImageSource, decode
from icons.datamodules.pixels import PixelMaker, processor_kind, square

CLIP = Path(__file__).parents[1] / "data" / "original_llava" / "clip"


def encoded(image: Image.Image, form: str = "png", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def noise(side: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8))


RED = Image.new("RGB", (8, 6), (255, 0, 0))


def status_of(action: Callable[[], object]) -> Status:
    with pytest.raises(FailedRowError) as failure:
        action()
    return failure.value.status


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (encoded(RED.convert("CMYK"), "jpeg", quality=95), (255, 0, 0)),
        (encoded(RED.convert("P")), (255, 0, 0)),
        (encoded(RED.convert("P"), transparency=b"\x00\x80"), (255, 0, 0)),
        (encoded(RED.convert("RGBA")), (255, 0, 0)),
        (encoded(RED.convert("LA")), (76, 76, 76)),
        (encoded(Image.new("1", (8, 6), 1)), (255, 255, 255)),
        (encoded(Image.fromarray(np.full((6, 8), 0x8042, dtype=np.uint16))), (128, 128, 128)),
        (encoded(RED, "gif", save_all=True, append_images=[Image.new("RGB", (8, 6), (0, 0, 255))]), (255, 0, 0)),
        (encoded(RED, "webp", lossless=True), (255, 0, 0)),
    ],
    ids=["cmyk", "palette", "palette-transparent", "rgba", "grey-alpha", "one-bit", "16-bit", "animated", "webp"],
)
def test_every_kind_of_image_becomes_rgb(content: bytes, colour: tuple[int, int, int]) -> None:
    image = decode(content, "x")
    assert image.mode == "RGB"
    assert image.size == (8, 6)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(colour)).max() <= 2


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
def test_a_truncated_image_is_broken(form: str) -> None:
    content = encoded(noise(64), form)
    assert status_of(lambda: decode(content[: len(content) // 2], "x")) == Status.IMAGE_BROKEN


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40), b"GIF89a"])
def test_what_is_no_image_is_broken(content: bytes) -> None:
    assert status_of(lambda: decode(content, "x")) == Status.IMAGE_BROKEN


@pytest.mark.parametrize("limit", [40, 10], ids=["over the limit", "over twice the limit"])
def test_a_decompression_bomb_is_too_large(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert status_of(lambda: decode(encoded(RED), "x")) == Status.TOO_LARGE


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("content", [EPS, b"%PDF-1.4\n", b"<svg/>", b"\x00\x01\x00\x00FITS", b"BLP1" + bytes(60)])
def test_only_formats_of_pictures_are_opened(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: object, **options: object) -> None:
        raise AssertionError(f"a program was started: {words}")

    monkeypatch.setattr("subprocess.Popen", run)
    assert status_of(lambda: decode(content, "photo.jpg")) == Status.IMAGE_BROKEN


def test_a_line_of_pixels_that_would_become_gigabytes_is_too_large() -> None:
    assert len(encoded(line := Image.new("RGB", (60_000, 1)))) < 1000
    assert status_of(lambda: decode(encoded(line), "x")) == Status.TOO_LARGE
    assert decode(encoded(Image.new("RGB", (500, 1))), "x").size == (500, 1)
    assert status_of(lambda: square(Image.new("RGB", (10_000, 100)), (0, 0, 0))) == Status.TOO_LARGE
    assert square(Image.new("RGB", (1_000, 100)), (0, 0, 0)).size == (1_000, 1_000)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_member_of_gigabytes_is_too_large_and_is_not_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icons.datamodules.images.MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(bytes((1 << 20) + 1))
    source = tmp_path / "in"
    if kind != "folder":
        source = tmp_path / f"images.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(tmp_path / "in" / "a.png", "a.png")
            assert source.stat().st_size < 5_000
        else:
            with tarfile.open(source, "w") as archive:
                archive.add(tmp_path / "in" / "a.png", "a.png")
    assert status_of(lambda: ImageSource(source).read("a.png")) == Status.TOO_LARGE


def test_16_bit_grey_keeps_its_high_byte() -> None:
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(grey)), "x"))[..., 0], grey >> 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    (images / "coco").mkdir(parents=True)
    (images / "coco" / "a.png").write_bytes(encoded(RED))
    (tmp_path / "secret.png").write_bytes(encoded(RED))
    return images


def test_images_come_from_a_folder(folder: Path) -> None:
    assert ImageSource(folder).open("coco/a.png").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "name", ["../secret.png", "coco/../../secret.png", "/etc/passwd", "..\\secret.png", "", "a\0b"]
)
def test_a_name_does_not_lead_out_of_the_folder(folder: Path, name: str) -> None:
    assert status_of(lambda: ImageSource(folder).open(name)) == Status.IMAGE_MISSING


def test_a_link_does_not_lead_out_of_the_folder(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    assert status_of(lambda: ImageSource(folder).open("link.png")) == Status.IMAGE_MISSING


def test_absolute_paths_stay_inside_the_folder_and_those_allowed(folder: Path, tmp_path: Path) -> None:
    inside, outside = folder / "coco" / "a.png", tmp_path / "secret.png"
    for name in (str(inside), inside.as_uri()):
        assert ImageSource(folder).open(name).getpixel((0, 0)) == (255, 0, 0)
    for name in (str(outside), outside.as_uri(), str(folder / ".." / "secret.png"), str(folder / "link.png")):
        assert status_of(lambda name=name: ImageSource(folder).open(name)) == Status.IMAGE_MISSING
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.png").write_bytes(encoded(RED))
    allowing = ImageSource(folder, allowed=[tmp_path / "more"])
    assert allowing.open(str(tmp_path / "more" / "b.png")).size == RED.size
    assert status_of(lambda: allowing.open(str(outside))) == Status.IMAGE_MISSING
    assert status_of(lambda: allowing.open(str(tmp_path / "more" / "none.png"))) == Status.IMAGE_MISSING


def test_a_name_may_be_the_image_itself() -> None:
    text = base64.b64encode(encoded(RED)).decode()
    for name in (text, "data:image/png;base64," + text, f"{text[:70]}\n{text[70:]}"):
        assert ImageSource(None).open(name).getpixel((0, 0)) == (255, 0, 0)
    for name in ("data:image/png," + text, "data:image/png;base64,a!"):
        assert status_of(lambda name=name: ImageSource(None).open(name)) == Status.IMAGE_BROKEN


def test_the_web_is_asked_once_and_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICONS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.png").write_bytes(encoded(RED))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        assert status_of(lambda: ImageSource(None).open(f"{place}/a.png")) == Status.IMAGE_MISSING
        source = ImageSource(None, web=True)
        assert source.open(f"{place}/a.png").size == RED.size
        assert status_of(lambda: source.open(f"{place}/none.png")) == Status.IMAGE_MISSING
        monkeypatch.setattr("icons.datamodules.image_address.MOST_BYTES", 10)
        (tmp_path / "b.png").write_bytes(encoded(RED))
        assert status_of(lambda: source.open(f"{place}/b.png")) == Status.TOO_LARGE
        server.shutdown()
    assert source.open(f"{place}/a.png").size == RED.size


def test_a_corrupt_archive_beside_the_images_costs_its_rows_alone(folder: Path) -> None:
    (folder / "vg.tar").write_bytes(b"no tar" * 500)
    source = ImageSource(folder)
    assert status_of(lambda: source.open("vg/1.png")) == Status.IMAGE_BROKEN
    assert source.open("coco/a.png").size == RED.size


@pytest.mark.parametrize("name", ["b.png", "coco", "coco/a.png/b.png"])
def test_what_is_not_there_is_missing(folder: Path, name: str) -> None:
    assert status_of(lambda: ImageSource(folder).open(name)) == Status.IMAGE_MISSING


def test_a_file_that_cannot_be_read_is_broken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bytes:
        raise OSError("disk")

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert status_of(lambda: ImageSource(folder).open("coco/a.png")) == Status.IMAGE_BROKEN


def test_without_a_folder_every_image_is_missing() -> None:
    assert status_of(lambda: ImageSource(None).open("a.png")) == Status.IMAGE_MISSING


def make_archive(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w") as archive:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_images_come_straight_from_an_archive(tmp_path: Path, suffix: str) -> None:
    members = {"coco/a.png": encoded(RED), "./b.png": encoded(noise()), "empty.png": b""}
    source = ImageSource(make_archive(tmp_path / f"images{suffix}", members))
    for opened in (source, pickle.loads(pickle.dumps(source))):
        assert opened.read("coco/a.png") == members["coco/a.png"]
        assert opened.read("b.png") == members["./b.png"]
        assert status_of(lambda opened=opened: opened.open("empty.png")) == Status.IMAGE_BROKEN
        assert status_of(lambda opened=opened: opened.open("c.png")) == Status.IMAGE_MISSING
        assert status_of(lambda opened=opened: opened.open("../b.png")) == Status.IMAGE_MISSING


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize(
    ("archive", "member"),
    [
        ("coco/train2017", "train2017/1.png"),
        ("coco/train2017", "1.png"),
        ("coco", "coco/train2017/1.png"),
        ("coco", "train2017/1.png"),
    ],
)
def test_a_folder_may_hold_archives(tmp_path: Path, suffix: str, archive: str, member: str) -> None:
    make_archive(tmp_path / f"{archive}{suffix}", {member: encoded(RED)})
    source = ImageSource(tmp_path)
    assert source.open("coco/train2017/1.png").size == (8, 6)
    assert status_of(lambda: source.open("coco/train2017/2.png")) == Status.IMAGE_MISSING


def test_a_damaged_member_is_broken(tmp_path: Path) -> None:
    path = make_archive(tmp_path / "images.zip", {"a.png": encoded(RED)})
    content = bytearray(path.read_bytes())
    content[50] ^= 0xFF
    path.write_bytes(content)
    assert status_of(lambda: ImageSource(path).open("a.png")) == Status.IMAGE_BROKEN


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match=r"images\.tar\.gz: .*expected a folder, a \.zip, or an uncompressed \.tar"):
        ImageSource(tmp_path / "images.tar.gz")


def test_a_missing_image_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such image folder; expected a folder"):
        ImageSource(tmp_path / "none")


def test_an_image_is_padded_to_the_middle_of_a_square() -> None:
    padded = np.asarray(square(Image.new("RGB", (3, 8), (9, 9, 9)), (1, 2, 3)))
    assert padded.shape == (8, 8, 3)
    assert (padded[:, 2:5] == 9).all()
    assert (padded[:, [0, 1, 5, 6, 7]] == [1, 2, 3]).all()


@pytest.mark.parametrize("size", [(56, 56), (57, 100), (101, 60), (640, 480), (20, 33), (56, 3000)])
@pytest.mark.parametrize("pad", [True, False])
def test_pixels_are_the_processors_bit_for_bit(size: tuple[int, int], pad: bool) -> None:
    content = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(content)
    maker = PixelMaker(CLIP, pad)
    assert maker.table is not None
    oracle = maker.processor(square(image, maker.colour) if pad else image, return_tensors="pt")["pixel_values"]
    assert torch.equal(maker([image]), oracle)


def test_an_unusual_processor_is_asked_itself(tmp_path: Path) -> None:
    settings = json.loads((CLIP / "preprocessor_config.json").read_text()) | {"do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    maker = PixelMaker(tmp_path, pad=False)
    assert maker.table is None
    assert maker([noise(60), noise(60)]).shape == (2, 3, 56, 56)


def test_pixels_without_padding_are_cut_from_the_centre() -> None:
    wide = np.zeros((56, 112, 3), dtype=np.uint8)
    wide[:, 28:84] = np.asarray(noise(56))
    cut = PixelMaker(CLIP, pad=False)([Image.fromarray(wide)])
    assert torch.equal(cut, PixelMaker(CLIP, pad=False)([noise(56)]))
    assert not torch.allclose(cut, PixelMaker(CLIP, pad=True)([Image.fromarray(wide)]))


def test_another_image_processor_than_clips_is_used_as_it_is(tmp_path: Path) -> None:
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert processor_kind(tmp_path) == "ViTImageProcessor"


def test_settings_of_a_whole_processor_serve_as_well(tmp_path: Path) -> None:
    inner = json.loads((CLIP / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert processor_kind(tmp_path).startswith("CLIP")
    assert torch.equal(PixelMaker(tmp_path, pad=True)([RED]), PixelMaker(CLIP, pad=True)([RED]))


def test_a_folder_without_image_settings_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config\.json there"):
        PixelMaker(tmp_path, pad=True)
