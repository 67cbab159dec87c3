"""A chunk comes back as it was, and damage is named with what was there and what was expected."""

import numpy as np
import pytest

from icons.store.chunk import from_bytes, num_bytes, to_parts


def content(values: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"".join(bytes(part) for part in to_parts(values, values.dtype)), np.uint8)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(3,), (3, 5), (1, 1), (0, 4)])
def test_numbers_come_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    found = content(values)
    assert len(found) == num_bytes(shape, values.dtype)
    back = from_bytes(found, shape, values.dtype)
    assert back.dtype == values.dtype
    np.testing.assert_array_equal(back, values)


def test_values_of_another_dtype_or_order_are_written_as_the_array_has_them() -> None:
    values = np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3))
    expected = content(np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(np.frombuffer(b"".join(to_parts(values, np.dtype(np.float32))), np.uint8), expected)


@pytest.mark.parametrize("bit", range(0, 8 * 28, 13))
def test_a_flipped_bit_is_found_wherever_it_is(bit: int) -> None:
    found = content(np.arange(6, dtype=np.float32)).copy()
    found[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=r"checksum: got 0x[0-9a-f]{8}; expected 0x[0-9a-f]{8}"):
        from_bytes(found, (6,), np.dtype(np.float32))


@pytest.mark.parametrize("length", [0, 3, 27, 29])
def test_another_length_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match=f"got {length} bytes; expected 28"):
        from_bytes(np.zeros(length, np.uint8), (6,), np.dtype(np.float32))
