"""Some rows' image files are known by size and checksum: the same for the same files, whatever holds them."""

import hashlib
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest

from icons.batch import Status
from icons.datamodules import image_marks as module
from icons.datamodules.conversation import Conversation, ImageRef, Turn
from icons.datamodules.failed_row import FailedRowError
from icons.datamodules.image_marks import image_marks
from icons.datamodules.images import ImageSource


def saying(*images: ImageRef) -> Conversation:
    return Conversation((Turn(True, (*images, "What?")), Turn(False, ("That.",))))


def named(row: int) -> Conversation:
    return saying(ImageRef(f"{row}.png"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for row in range(200):
        (tmp_path / f"images/{row}.png").write_bytes(f"image {row}".encode())
    return tmp_path / "images"


def test_sixty_four_rows_all_over_the_data_have_marks_of_their_files_bytes(folder: Path) -> None:
    found = image_marks(range(200), named, ImageSource(folder))
    rows = [int(row) for row in found]
    assert len(rows) == 64 and rows == sorted(rows) and rows[0] == 0 and rows[-1] > 190
    assert max(second - first for first, second in pairwise(rows)) <= 4
    for row, marks in found.items():
        content = (folder / f"{row}.png").read_bytes()
        assert marks == {f"{row}.png": f"{len(content)}-{hashlib.sha256(content).hexdigest()[:16]}"}
    with zipfile.ZipFile(folder.parent / "images.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    assert image_marks(range(200), named, ImageSource(folder.parent / "images.zip")) == found


def test_of_rows_without_an_image_file_the_next_one_with_one_stands(folder: Path) -> None:
    def some(row: int) -> Conversation:
        if row % 5 == 0:
            raise FailedRowError(Status.BAD_RECORD, "no conversation")
        return named(row) if row % 5 == 3 else saying()

    found = image_marks(range(200), some, ImageSource(folder))
    assert found and all(int(row) % 5 == 3 for row in found)
    assert image_marks(range(200), lambda row: saying(), ImageSource(None)) == {}
    assert image_marks(range(0), named, ImageSource(folder)) == {}


def test_a_file_that_cannot_be_read_has_no_mark_and_an_empty_one_has(folder: Path) -> None:
    (folder / "0.png").unlink()
    (folder / "1.png").write_bytes(b"")
    found = image_marks(range(2), named, ImageSource(folder))
    assert found == {"0": {"0.png": None}, "1": {"1.png": f"0-{hashlib.sha256().hexdigest()[:16]}"}}


def test_what_the_data_file_holds_itself_and_what_is_on_the_web_is_not_looked_at(folder: Path) -> None:
    embedded = [ImageRef("a.png", b"content"), ImageRef("data:image/png;base64,AAAA"), ImageRef("A" * 64)]
    rows = [saying(image) for image in (*embedded, ImageRef("https://example.org/a.png"))]
    rows.append(saying(embedded[0], ImageRef("3.png")))
    assert list(image_marks(range(5), rows.__getitem__, ImageSource(folder, web=True)).values()) == [
        {"3.png": f"7-{hashlib.sha256(b'image 3').hexdigest()[:16]}"}
    ]


def test_large_files_leave_out_rows_all_over_the_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 8 * len("image 100"))
    rows = [int(row) for row in image_marks(range(200), named, ImageSource(folder))]
    assert 8 <= len(rows) <= 10
    assert max(second - first for first, second in zip(rows, [*rows[1:], 200], strict=True)) <= 50
