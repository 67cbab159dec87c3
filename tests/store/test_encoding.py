"""Rows are stored as numpy rounds them; int8 adds less error than the projection has; nothing overflows silently."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from icons.batch import Status
from icons.projection import CountSketch
from icons.store.encoding import TORCH_SERIAL, decode, encode, encode_rows


def results(gradient: np.ndarray, status: int = 1) -> dict[str, np.ndarray]:
    n = len(gradient)
    return {
        "gradient": gradient,
        "norm": np.full(n, 3.0, np.float32),
        "loss": np.full(n, 2.0, np.float32),
        "tokens": np.full(n, 9, np.int32),
        "status": np.full(n, status, np.uint8),
    }


def test_float16_is_rounded_as_numpy_rounds() -> None:
    scale = np.logspace(-1, 4, 64, dtype=np.float32)[:, None]
    gradient = np.random.default_rng(0).standard_normal((64, 1111)).astype(np.float32) * scale
    assert gradient.size > 2 * TORCH_SERIAL, "in several pieces"
    stored, scales = encode(gradient, "float16")
    assert scales is not None and (scales == 1).all()
    np.testing.assert_array_equal(stored.view(np.uint16), gradient.astype(np.float16).view(np.uint16))
    backwards = gradient[::-1, ::-1]
    np.testing.assert_array_equal(encode(backwards, "float16")[0], backwards.astype(np.float16))


@pytest.mark.parametrize("exponent", [-44, -38, *range(-30, 31, 3), 37])
def test_float16_loses_nothing_of_rows_of_any_norm(exponent: int) -> None:
    """Relative error as of numbers near one: half a unit in the last of eleven bits, and far from it never more."""
    rows = np.random.default_rng(0).standard_normal((4, 512))
    rows *= 10.0**exponent / np.linalg.norm(rows, axis=1, keepdims=True)
    given = rows.astype(np.float32)
    stored = encode_rows(results(given), "float16")
    assert stored["status"].tolist() == [Status.DONE] * 4
    found = stored["gradients"].astype(np.float64) * stored["scale"][:, None]
    error = np.linalg.norm(found - given, axis=1) / np.linalg.norm(given.astype(np.float64), axis=1)
    assert (error < 2**-11).all()
    assert np.isin(np.frexp(stored["scale"])[0], 0.5).all(), "powers of two"


SAFE = np.float32(2.0**-10)
BORDERS = [SAFE, *(np.nextafter(SAFE, np.float32(beside)) for beside in (0, 1)), SAFE * np.float32(1 - 2.0**-12)]
BORDERS += [np.float32(value) for value in (65519.996, 65520, 1e-7, 0, np.inf, 2)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("largest", BORDERS)
def test_a_float16_row_has_the_scale_that_its_largest_float32_number_asks_for(largest: float, sign: int) -> None:
    """Whoever stands beside it in the batch, and wherever the rows are put."""
    row = np.array([0, 0.5 * largest, -0.25 * largest, sign * largest], np.float32)
    for beside in (np.float32([1, -2, 3, 0]), np.float32([1e-9, 0, 0, 0]), np.float32([0, np.nan, 0, 0])):
        out = np.full((2, 4), 7, np.float16)
        stored = encode_rows(results(np.stack([row, beside])), "float16", out=out)
        assert stored["gradients"] is out
        if not np.isfinite(row).all():
            assert stored["status"][0] == Status.NON_FINITE and not out[0].any()
            continue
        keeps = largest == 0 or 2.0**-10 <= largest < 65520
        scale = 1.0 if keeps else 2.0 ** (math.floor(math.log2(largest)) - 14)
        assert stored["scale"][0] == scale and stored["status"][0] == Status.DONE
        expected = (row.astype(np.float64) / scale).astype(np.float32).astype(np.float16)
        np.testing.assert_array_equal(out[0].view(np.uint16), expected.view(np.uint16))


def test_int8_error_is_at_most_half_a_step_and_zero_rows_stay_zero() -> None:
    gradient = np.random.default_rng(0).standard_normal((20, 50)).astype(np.float32)
    gradient[3] = 0
    stored, scale = encode(gradient, "int8")
    assert stored.dtype == np.int8 and scale is not None and scale[3] == 0 and not stored[3].any()
    assert (np.abs(stored * scale[:, None] - gradient) <= scale[:, None] * 0.5001).all()


def test_int8_adds_a_fiftieth_of_the_projections_own_noise_to_a_cosine() -> None:
    """The noise of a projection to K numbers is about 1 / sqrt(K) per cosine: 0.014 for K = 5120."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 200, 4 * 5120, generator=generator)
    right += 0.3 * left
    sketch = CountSketch(5120, seed=0)

    def project(block: torch.Tensor) -> torch.Tensor:
        rows = sketch.start(len(block), {"weight": block[0].shape}, torch.device("cpu"))
        sketch.add(rows, "weight", block)
        return rows

    def through_int8(rows: torch.Tensor) -> torch.Tensor:
        stored, scale = encode(rows.numpy(), "int8")
        assert scale is not None
        return torch.from_numpy(stored * scale[:, None])

    rows = [project(left), project(right)]
    projected = cosine_similarity(rows[0], rows[1])
    noise = (projected - cosine_similarity(left, right)).std()
    added = (cosine_similarity(through_int8(rows[0]), through_int8(rows[1])) - projected).std()
    assert 0.005 < noise < 0.02 and added < noise / 50


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_done_row_with_a_number_that_is_not_finite_becomes_non_finite(dtype: str, bad: float) -> None:
    gradient = np.ones((3, 4), np.float32)
    gradient[1, 2] = bad
    stored = encode_rows(results(gradient), dtype)
    assert stored["status"].tolist() == [Status.DONE, Status.NON_FINITE, Status.DONE]
    assert not stored["gradients"][1].any() and stored["gradients"][[0, 2]].all()
    assert np.isnan(stored["norm"][1]) and np.isnan(stored["loss"][1]) and stored["tokens"].tolist() == [9, 0, 9]


@pytest.mark.parametrize(("value", "status"), [(65504.0, 1), (65519.0, 1), (65520.0, 6), (-1e6, 6)])
def test_a_float16_store_of_earlier_versions_has_no_scale(value: float, status: int) -> None:
    gradient = np.array([[1.0, value]], np.float32)
    half = encode_rows(results(gradient), "float16", scaled=False)
    assert half["status"].tolist() == [status] and np.isfinite(half["gradients"]).all() and "scale" not in half
    for dtype in ("float16", "float32"):
        stored = encode_rows(results(gradient), dtype)
        assert stored["status"].tolist() == [1]
        np.testing.assert_allclose(stored["gradients"] * stored.get("scale", 1.0), gradient, rtol=2**-11)


def test_results_given_are_not_changed() -> None:
    given = results(np.full((2, 2), np.inf, np.float32))
    encode_rows(given, "float16")
    assert given["status"].tolist() == [1, 1] and np.isinf(given["gradient"]).all() and (given["norm"] == 3).all()


def test_a_row_that_is_not_written_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"status: got 0 \(not written\); expected 1 \(done\) or a code of failure"):
        encode_rows(results(np.ones((1, 2), np.float32), status=0), "float16")


def test_no_rows_are_encoded_to_no_rows() -> None:
    assert encode_rows(results(np.ones((0, 4), np.float32)), "int8")["gradients"].shape == (0, 4)


SIZES = [
    *np.float32(2.0) ** np.arange(-149, 128, 5),
    *(np.float32(2.0**-149) * np.arange(1, 400, 13, dtype=np.float32)),
]
SIZES += [np.float32(value) for value in (1e-44, 1e-38, 2.0**-126 * 126.7, 3.4e38, np.finfo(np.float32).max)]


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize(("dtype", "step"), [("float16", 2**-11), ("int8", 0.5001 / 127)])
def test_no_size_of_a_row_loses_more_than_half_a_step(dtype: str, step: float, flush: bool) -> None:
    """Down to float32's smallest number and up to its largest, even in rows of one large and many small numbers."""
    shapes = np.random.default_rng(0).uniform(-1, 1, (2, 64))
    shapes[1] *= 1e-4
    shapes[:, 0] = 1, -1
    sizes = np.array(SIZES, np.float64)
    exact = (sizes[:, None, None] * shapes).reshape(-1, 64).astype(np.float32).astype(np.float64)
    rows = exact.astype(np.float32)
    torch.set_flush_denormal(flush)
    try:
        stored = encode_rows(results(rows), dtype)
        found = decode(stored["gradients"].astype(np.float32), stored["scale"])
    finally:
        torch.set_flush_denormal(False)
    assert (stored["status"] == Status.DONE).all() and np.isfinite(found).all()
    # half of the step's own rounding, where float32 has few digits left
    assert (np.abs(found - exact) <= step * np.abs(exact).max(axis=1, keepdims=True) + 2.0**-150).all()
    assert (found[:, 0] != 0).all()
