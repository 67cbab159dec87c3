"""What the page shows of a record: text, picture, source."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from icons.datamodules.dialects import dialect_named
from icons.datamodules.record_lists import source_of
from icons.report.page import Turn
from icons.report.rows import composition, flat, thumbnail, turns


def test_a_record_of_two_dialects_is_shown_in_the_one_that_is_asked_for() -> None:
    record = {
        "conversations": [{"from": "human", "value": "Red?"}, {"from": "gpt", "value": "Yes"}],
        "messages": [{"role": "user", "content": "Blue?"}, {"role": "assistant", "content": "No"}],
    }
    assert [turn.text for turn in turns(record)] == ["Red?", "Yes"]
    assert [turn.text for turn in turns(record, dialect_named("messages"))] == ["Blue?", "No"]
    assert turns(record, dialect_named("alpaca")) == []


def test_long_texts_and_many_turns_are_cut() -> None:
    said = [{"from": "human", "value": "x" * 1000}, {"from": "gpt", "value": "y"}] * 4
    shown = turns({"conversations": said})
    assert len(shown) == 5
    assert shown[0].text == "x" * 320 + " …"
    assert shown[1] == Turn("y", answer=True)
    assert shown[-1].text == "… and 4 more turns"


@pytest.mark.parametrize("record", [{}, {"conversations": None}, {"conversations": ["no turn", 3]}])
def test_a_record_without_conversations_shows_none(record: dict[str, object]) -> None:
    assert turns(record) == []


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1", "LA"])
def test_a_thumbnail_is_a_small_jpeg_whatever_the_mode(mode: str) -> None:
    address = thumbnail(Image.new(mode, (900, 300)))
    with Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (216, 72))


def test_transparency_is_white() -> None:
    address = thumbnail(Image.new("RGBA", (9, 9), (255, 0, 0, 0)))
    with Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) as image:
        assert min(image.getpixel((4, 4))) > 250


@pytest.mark.parametrize(
    ("record", "field", "source"),
    [
        ({"image": "gqa/images/1.jpg"}, None, "gqa"),
        ({"image": ["vg/a.jpg", "coco/b.jpg"]}, None, "vg"),
        ({"image": "1.jpg"}, None, "images"),
        ({"image": "nan"}, None, "text only"),
        ({"image": []}, None, "text only"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "coco/1.jpg"}]}]}, None, "coco"),
        ({"messages": [{"role": "nobody", "content": [{"type": "image", "image": "coco/1.jpg"}]}]}, None, "text only"),
        ({}, None, "text only"),
        ({"kind": 3}, "kind", "3"),
        ({"kind": "x"}, "kind.deeper", "(none)"),
        ({}, "kind", "(none)"),
    ],
)
def test_sources(record: dict[str, object], field: str | None, source: str) -> None:
    assert source_of(record, field) == source


def test_composition_counts_pool_and_selection() -> None:
    kinds = ["a", "a", "b", None, "c", "a"]
    selected = np.array([True, False, True, False, False, False])
    names, pool, chosen = composition(
        np.arange(6), selected, lambda row: {"kind": kinds[row]} if kinds[row] else None, "kind"
    )
    assert names == ["a", "b", "(unreadable)", "c"]
    np.testing.assert_allclose(pool, [3 / 6, 1 / 6, 1 / 6, 1 / 6])
    np.testing.assert_allclose(chosen, [1 / 2, 1 / 2, 0, 0])


def test_sources_beyond_the_twelfth_are_one() -> None:
    names, pool, chosen = composition(np.arange(40), np.ones(40, bool), lambda row: {"kind": row % 20}, "kind")
    assert len(names) == 13 and names[-1] == "other"
    np.testing.assert_allclose([pool.sum(), chosen.sum(), pool[-1]], [1, 1, 16 / 40])


def test_an_empty_selection_has_shares_of_zero() -> None:
    assert composition(np.arange(3), np.zeros(3, bool), lambda row: {"kind": "a"}, "kind")[2].tolist() == [0.0]


def test_a_manifest_is_shown_flat() -> None:
    manifest = {"a": {"b": {"c": [1, 2]}}, "d": None, "e": {}, "f": [], "g": False}
    assert flat(manifest) == [("a.b.c", "1, 2"), ("d", "none"), ("f", "none"), ("g", "False")]
