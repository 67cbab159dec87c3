"""The images that a record names: in `image` or `images`, as names, addresses, bytes, or `{bytes, path}`."""

from collections.abc import Mapping
from typing import Any

from icons.datamodules.conversation import ImageRef
from icons.datamodules.failed_row import bad_record

Record = Mapping[str, Any]
_NOTHING = ("", "none", "nan")  # Cambrian's ways to say that a record has no image


def given(value: Any) -> bool:
    """Whether a field holds something; data sets fill fields that a record lacks with null or empty lists."""
    return (
        value is not None
        and value != []
        and not (isinstance(value, str | float) and str(value).strip().lower() in _NOTHING)
    )


def images_of(record: Record) -> list[ImageRef]:
    """The images of a record's `image` or `images`: none, one, or several.

    >>> images_of({"image": "None"}), images_of({"images": ["a.jpg", "b.jpg"]})
    ([], [ImageRef(name='a.jpg', content=None), ImageRef(name='b.jpg', content=None)])
    """
    fields = [name for name in ("image", "images") if given(record.get(name))]
    if len(fields) > 1:
        raise bad_record("has both `image` and `images`; expected one of them")
    if not fields:
        return []
    value = record[fields[0]]
    values = value if isinstance(value, list) else [value]
    return [image_ref(one) for one in values] if any(given(one) for one in values) else []


def image_ref(value: Any) -> ImageRef:
    """One image: a name or an address, bytes, or `{bytes, path}`."""
    if isinstance(value, str):
        return ImageRef(value)
    if isinstance(value, bytes):
        return ImageRef("in the record", value)
    if isinstance(value, Mapping):
        content = value.get("bytes")
        name = next((value[key] for key in ("path", "url", "image_url") if isinstance(value.get(key), str)), None)
        if isinstance(content, bytes):
            return ImageRef(name or "in the record", content)
        if isinstance(content, str):
            return ImageRef(content)  # base64
        if name is not None:
            return ImageRef(name)
    raise bad_record(f"has the image {str(value)[:60]!r}; expected a name, an address, bytes, or {{bytes, path}}")
