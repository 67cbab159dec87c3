"""How rows are stored: float32 results -> the arrays of a gradient store, in its dtype."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from icons.batch import Status

DTYPES = ("float16", "float32", "int8")
FIELDS = ("gradient", "norm", "loss", "tokens", "status")
_FLOAT16_LIMIT = 65520.0  # from here on, rounding to the nearest float16 gives infinity
_FLOAT16_SAFE = 2.0**-10  # a row with a number as large loses less to float16's narrow range than to its rounding
_FLOAT16_TOP = 14  # exponent that the largest number of any other row gets
_FLOAT16_MOST, _FLOAT16_ROOM = np.float32(2.0**113), 2**15 - 16  # largest scale; times it, a larger number is infinite
_INT8_MOST = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))  # 127 times it is finite
_LEAST = np.float32(2.0**-149)  # of all float32 above 0; all others are multiples of it
_LEAST_NORMAL = np.float32(2.0**-126)
_SAFE_BITS = int(np.float16(_FLOAT16_SAFE).view(np.uint16))  # the same, as integers
_INF_BITS = int(np.float16(np.inf).view(np.uint16))
_SIGN = np.uint16(1 << 15)
TORCH_SERIAL = 32767  # numbers: from 32,768 on torch cuts an operation into parts for its threads


def encode(
    gradient: np.ndarray, dtype: str, largest: np.ndarray | None = None, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 rows as they are stored, and the scale per row for float16 and int8.

    float16 rounds to the nearest (ties to even). Its scale is 1 where the row's largest number is from 2^-10 to 65,504,
    and otherwise the power of two that makes it one: nothing is lost to float16's narrow range. int8: `scale = max|row|
    / 127` (below 2^-126, where float32 has few digits left, the next number above), values rounded to the nearest (ties
    to even); a zero row has scale 0. The rounding error is uniform in one step: its variance is `scale^2 / 12` per
    number. Only rows of zeros become zeros, even in a thread that flushes float32's smallest numbers to zero.

    Args:
        gradient: `[n, K]`.
        dtype: one of `DTYPES`.
        largest: `_largest_of(gradient)`, if it is known.
        out: where the stored rows are put, if they are float16; default: new memory.

    >>> encode(np.array([[1.0, -2.0]], dtype=np.float32), "int8")[0].tolist()
    [[64, -127]]
    """
    if dtype == "float32":
        return gradient, None
    with _no_flushing():
        largest = _largest_of(gradient) if largest is None else largest
        if dtype == "float16":
            scale = _float16_scale(largest)
            scaled = gradient if (scale == 1).all() else gradient / scale[:, None]  # exact: powers of two
            if (scale == _FLOAT16_MOST).any():
                scaled.clip(-_FLOAT16_ROOM, _FLOAT16_ROOM, out=scaled, where=scale[:, None] == _FLOAT16_MOST)
            return _to_float16(scaled, out), scale
        scale = _int8_scale(largest)
        steps = gradient / np.where(scale > 0, scale, 1)[:, None]
        return np.rint(steps).clip(-127, 127).astype(np.int8), scale


def decode(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The rows `[n, K]` again, float32, from what is stored as float32 and their scales `[n]`."""
    with _no_flushing():
        return np.asarray(stored * scale[:, None])


def _largest_of(gradient: np.ndarray) -> np.ndarray:
    """Each row's largest magnitude, `[n]`; NaN if there is one.

    >>> _largest_of(np.array([[1.0, -2.0], [0.0, 0.0]])).tolist()
    [2.0, 0.0]
    """
    return np.maximum(gradient.max(axis=1, initial=0), np.abs(gradient.min(axis=1, initial=0)))


def _int8_scale(largest: np.ndarray) -> np.ndarray:
    """The step of each row, `[n]` float32, by its largest magnitude.

    >>> _int8_scale(np.array([254, 0, 2.0**-148, 190 * 2.0**-149], dtype=np.float32)) / [2, 1, 2.0**-149, 2.0**-149]
    array([1., 0., 1., 2.])
    """
    scale = np.minimum(largest / np.float32(127), _INT8_MOST)
    rounded_up = np.ceil(np.minimum(largest, 127 * _LEAST_NORMAL) / _LEAST / np.float32(127)) * _LEAST
    return np.where(scale < _LEAST_NORMAL, rounded_up, scale).astype(np.float32)


def _float16_scale(largest: np.ndarray) -> np.ndarray:
    """What to divide each row by, `[n]` float32, by its largest magnitude.

    >>> _float16_scale(np.array([2.0, 3e-5, 0.0, 1e6], dtype=np.float32)).tolist()
    [1.0, 9.313225746154785e-10, 1.0, 32.0]
    """
    exponent = np.frexp(largest)[1] - 1 - _FLOAT16_TOP
    keep = (largest == 0) | ((largest >= _FLOAT16_SAFE) & (largest < _FLOAT16_LIMIT)) | ~np.isfinite(largest)
    # -126: beyond it float32 itself has no whole powers of two
    return np.where(keep, 1, np.ldexp(np.float32(1), np.maximum(exponent, -126))).astype(np.float32)


@contextmanager
def _no_flushing() -> Iterator[None]:
    """Numbers below 2^-126 count, whatever `torch.set_flush_denormal` has said to this thread."""
    flushing = not (_LEAST_NORMAL / np.float32(2)).any()
    if flushing:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushing:
            torch.set_flush_denormal(True)


def _to_float16(gradient: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The nearest float16, in `out` if that is given (C-contiguous). torch converts in vector registers, ten times as
    fast as numpy, to the same bits.

    In pieces for which torch starts no threads: those would wait at each conversion for a core that a background writer
    or another rank is using, which has taken a hundred times as long as the conversion itself.
    """
    half = np.empty(gradient.shape, np.float16) if out is None else out
    assert half.flags.c_contiguous, "or what is put there would be put in a copy"
    target, source = (torch.from_numpy(array).reshape(-1) for array in (half, np.ascontiguousarray(gradient)))
    piece = max(1, len(target)) if torch.get_num_threads() == 1 else TORCH_SERIAL
    for into, values in zip(target.split(piece), source.split(piece), strict=True):
        into.copy_(values)
    return half


def _needs_no_scale(half: np.ndarray) -> bool:
    """Whether each row's largest magnitude was, before it was rounded to these float16, certainly above `_FLOAT16_SAFE`
    and below `_FLOAT16_LIMIT`: rounding keeps the order, and both limits are numbers of float16 or round to infinity.

    Reads half the bytes of `_largest_of`. As integers, float16 of one sign lie in the order of their magnitudes, and
    all negative ones above all others.

    >>> [_needs_no_scale(np.array([row], np.float16)) for row in ([1.0, -2.0], [0.0, -1e-3], [1.0, np.nan])]
    [True, True, False]
    """
    positive = half.view(np.int16).max(axis=1, initial=0)
    negative = half.view(np.uint16).max(axis=1, initial=_SIGN) - _SIGN
    return bool(((np.maximum(positive, negative) > _SAFE_BITS) & (positive < _INF_BITS) & (negative < _INF_BITS)).all())


def encode_rows(
    results: Mapping[str, np.ndarray], dtype: str, scaled: bool = True, out: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Results as the arrays of a gradient store, in the order in which they are written.

    Args:
        results: `gradient [n, K]`, `norm [n]`, `loss [n]`, `tokens [n]`, `status [n]`.
        dtype: of the stored rows. A finished row with a number that is not finite gets the status NON_FINITE.
        scaled: False for a float16 store that was begun without scales: what float16 cannot hold (above 65,504) is
            then NON_FINITE too.
        out: `[n, K]`, C-contiguous: float16 rows are put there, and are what is returned.

    Raises:
        ValueError: a status is 0 (not written).
    """
    gradient, status = np.asarray(results["gradient"], dtype=np.float32), np.array(results["status"], dtype=np.uint8)
    if (status == Status.NOT_WRITTEN).any():
        raise ValueError("status: got 0 (not written); expected 1 (done) or a code of failure for every row")
    norm, loss = (np.array(results[name], dtype=np.float32) for name in ("norm", "loss"))
    tokens = np.array(results["tokens"], dtype=np.int32)
    if dtype == "float16" and _needs_no_scale(half := _to_float16(gradient, out)):
        stored, scale = half, np.ones(len(half), np.float32) if scaled else None
    else:
        with _no_flushing():
            largest = _largest_of(gradient)
        limit = _FLOAT16_LIMIT if dtype == "float16" and not scaled else np.inf
        beyond = (status == Status.DONE) & ~(largest < limit)
        if beyond.any():
            gradient = np.where(beyond[:, None], np.float32(0), gradient)
            largest[beyond] = 0
            status[beyond], norm[beyond], loss[beyond], tokens[beyond] = Status.NON_FINITE, np.nan, np.nan, 0
        if dtype == "float16" and not scaled:
            stored, scale = _to_float16(gradient, out), None
        else:
            stored, scale = encode(gradient, dtype, largest, out)
    scales = {} if scale is None else {"scale": scale}
    return {"gradients": stored, **scales, "norm": norm, "loss": loss, "tokens": tokens, "status": status}
