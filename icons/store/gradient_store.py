"""GradientStore: row i is record i of the data file, always. A Zarr v3 group that any Zarr reader opens.

| array | shape, dtype | meaning |
|---|---|---|
| `gradients` | `[N, K]` float16, float32 or int8 | projected per-sample gradients, not normalised |
| `scale` | `[N]` float32, with float16 and int8 | `gradients[i] * scale[i]` is the row; 1 for most rows of float16 |
| `norm` | `[N]` float32 | L2 norm before projection |
| `loss` | `[N]` float32 | the sample's loss |
| `tokens` | `[N]` int32 | supervised tokens |
| `status` | `[N]` uint8 | 0 not written, 1 done, 2 and up failed: see the attribute `icons_status` |

A unit's chunks are written in the order rows, scalars, `status`, each chunk atomically and flushed, with a crc32c.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zarr
from jaxtyping import Float
from torch import Tensor

from icons.agreement import PLACES, RESUMED, check_compatible
from icons.partition import Partition
from icons.store.encoding import DTYPES, FIELDS, decode, encode_rows
from icons.store.former import stored_kind
from icons.store.image_files import check_images
from icons.store.layout import Column, parse_codec
from icons.store.row_store import RowStore
from icons.store.score_store import ScoreStore
from icons.store.storage import Storage

_MIN_CHUNK_BYTES, _MAX_CHUNK_BYTES, _PARALLEL_UNITS = 2_000_000, 16_000_000, 64


class UnitRows(NamedTuple):
    """One unit, read: `gradient [n, K]` float32, `norm [n]`, `loss [n]`, `tokens [n]`, `status [n]`."""

    gradient: np.ndarray
    norm: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray
    status: np.ndarray


class GradientStore(RowStore):
    """A gradient store; `open` one, or `create` it.

    Attributes:
        gradients, norm, loss, tokens, status: the zarr arrays; `scale` too, None with float32 (and in float16 stores of
            earlier versions).
        dtype: of the rows, as numpy names it.
        manifest: what the rows were made from.
        partition: rows -> write units.
    """

    KIND = "gradient"
    FIELDS = FIELDS

    def __init__(self, storage: Any, group: zarr.Group) -> None:
        super().__init__(storage, group)
        self.gradients, self.norm = self.arrays["gradients"], self.arrays["norm"]
        self.loss, self.tokens, self.scale = self.arrays["loss"], self.arrays["tokens"], self.arrays.get("scale")
        self.dtype = str(self.gradients.dtype)

    def encode(
        self, results: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Results (`FIELDS`) as this store's arrays; float16 rows are put in `out["gradients"]`, if that is given."""
        return encode_rows(results, self.dtype, scaled=self.scale is not None, out=(out or {}).get("gradients"))

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        num_rows: int,
        dim: int,
        dtype: str = "float16",
        chunk_rows: int | None = None,
        manifest: Mapping[str, Any] | None = None,
        codec: str | Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> "GradientStore":
        """Makes an empty store.

        Args:
            path: a folder that is new or empty, or a URL.
            num_rows: records of the data file.
            dim: numbers per row.
            dtype: float16 or int8 (one scale per row each), or float32.
            chunk_rows: rows per chunk, which is the unit of writing; default: chunks of 2 to 16 MB.
            manifest: what the rows are made from; `dtype` is added.
            codec: compressor for the rows. Default none: gradients are noise to a compressor (see docs/why.md).
            overwrite: also beside files that are not a store's; they stay.

        Raises:
            ValueError: an unknown dtype or codec, no rows, or files there that are not a store's.
            FileExistsError: a store is there.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        if num_rows < 1 or dim < 1:
            raise ValueError(f"store {path}: got num_rows={num_rows}, dim={dim}; expected both to be >= 1")
        columns = {"gradients": Column(dtype, 0, (("dim", dim),), parse_codec(codec))}
        if dtype != "float32":
            columns["scale"] = Column("float32", 0 if dtype == "int8" else 1)
        columns |= {"norm": Column("float32", np.nan), "loss": Column("float32", np.nan)}
        columns |= {"tokens": Column("int32", 0), "status": Column("uint8", 0)}
        chunk_rows = chunk_rows or fitting_chunk_rows(num_rows, dim, dtype)
        described = {**(manifest or {}), "dtype": dtype}
        return cls._create(path, Partition(num_rows, chunk_rows), columns, described, overwrite=overwrite)

    @classmethod
    def open_or_create(
        cls,
        path: str | Path,
        *,
        num_rows: int,
        dim: int,
        dtype: str = "float16",
        chunk_rows: int | None = None,
        manifest: Mapping[str, Any] | None = None,
        codec: str | Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> "GradientStore":
        """Opens the store at `path` to go on with it, or makes it. Arguments as for `create`.

        With `overwrite`, a store that was made from something else is taken away first.

        Raises:
            ValueError: the store there was made from something else: the field and both values.
        """
        described = {**(manifest or {}), "dtype": dtype}
        made: dict[str, Any] = {"num_rows": num_rows, "dim": dim, "dtype": dtype, "chunk_rows": chunk_rows}
        made |= {"manifest": manifest, "codec": codec, "overwrite": overwrite}
        return cls.taken_up(
            path,
            lambda store: store.check_resumable(described, num_rows, dim, chunk_rows),
            lambda: cls.create(path, **made),
            overwrite,
        )

    def check_resumable(
        self, manifest: Mapping[str, Any], num_rows: int, dim: int, chunk_rows: int | None = None
    ) -> None:
        """Checks that a run with these settings may go on with this store.

        Raises:
            ValueError: the first difference, with its field and both values.
        """
        here = {"rows": self.num_rows, "dim": self.dim, "chunk_rows": self.partition.chunk_rows}
        asked = {"rows": num_rows, "dim": dim, "chunk_rows": chunk_rows or self.partition.chunk_rows}
        what = f"the store {self.path}"
        check_compatible(
            {**_compared(self.manifest), **here},
            {**_compared(manifest), **asked},
            [*RESUMED, *(["computation"] if "computation" in self.manifest else []), *here],
            what,
            "this run",
        )
        check_images(self, manifest)

    @property
    def dim(self) -> int:
        return int(self.gradients.shape[1])

    def rows(self, rows: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Gradients of the given rows, `[n, K]` float32; scaled back. Rows not written or failed are zeros.

        Args:
            rows: a slice, or row numbers in any order.
        """
        if isinstance(rows, slice) and rows.step in (None, 1):
            stored = self.stored("gradients", rows).astype(np.float32, copy=False)
            return stored if self.scale is None else decode(stored, self.stored("scale", rows))
        index = np.arange(self.num_rows)[rows] if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        try:
            stored = np.asarray(self.gradients.oindex[index], dtype=np.float32)
            return stored if self.scale is None else decode(stored, np.asarray(self.scale.oindex[index]))
        except (ValueError, RuntimeError) as error:
            raise self.damaged("gradients", error) from error

    def tensor(self, rows: slice | Sequence[int] | np.ndarray) -> Float[Tensor, "rows dim"]:
        """`rows` as a torch tensor on the CPU, without a copy."""
        return torch.from_numpy(self.rows(rows))

    def read_unit(self, unit: int) -> UnitRows:
        """One unit; costs one chunk of each array."""
        rows = self.partition.unit_rows(unit)
        span = slice(rows.start, rows.stop)
        scalars = [self.stored(name, span) for name in ("norm", "loss", "tokens", "status")]
        return UnitRows(self.rows(span), *scalars)

    def write_unit(self, unit: int, results: Mapping[str, np.ndarray]) -> None:
        """Writes one unit: rows, scalars, then `status`.

        Args:
            unit: which.
            results: `gradient [n, K]` float32, `norm`, `loss`, `tokens`, `status`, each for all rows of the unit in
                order.

        Raises:
            ValueError: a shape is not that of the unit, an array is missing or unknown, or a status is 0.
        """
        self.write_columns(unit, encode_rows(results, self.dtype, scaled=self.scale is not None))

    def __repr__(self) -> str:
        counts = self.counts()
        facts, collected = self.facts, self.manifest.get("collect")
        kind, dim, seed = (
            "?" if value is None else value
            for value in (facts.projector.kind, facts.projector.dim, facts.projector.seed)
        )
        lines = [
            f"GradientStore({self.path!r})",
            f"  rows       {self.num_rows:,} x {self.dim:,} {self.dtype} ({self.num_bytes() / 1e9:.2f} GB)",
            f"  done       {counts['done']:,}   failed {counts['failed']:,}   missing {counts['missing']:,}",
            f"  projector  {kind} (dim {dim}, seed {seed})" if collected is None else f"  rows hold  {collected}",
            f"  model      {facts.model.fingerprint}   adapter {facts.adapter.fingerprint}",
        ]
        return "\n".join(lines)


def _compared(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest without what may differ between a run and its resume."""
    return {
        name: {key: entry for key, entry in value.items() if key not in PLACES} if isinstance(value, Mapping) else value
        for name, value in manifest.items()
    }


def fitting_chunk_rows(num_rows: int, dim: int, dtype: str) -> int:
    """Rows per chunk: a power of two for which a chunk has 2 to 16 MB, or one row where that alone has more.

    The largest such, since each unit costs a few files; halved while there are fewer than 64 units, so that there is
    work for many ranks.

    >>> fitting_chunk_rows(7_000_000, 5120, "float16"), fitting_chunk_rows(3_000, 5120, "float16")
    (1024, 256)
    """
    row_bytes = dim * np.dtype(dtype).itemsize
    rows = 1 << max(0, (_MAX_CHUNK_BYTES // row_bytes).bit_length() - 1)
    while rows * row_bytes >= 2 * _MIN_CHUNK_BYTES and -(-num_rows // rows) < _PARALLEL_UNITS and rows > 1:
        rows //= 2
    return min(rows, num_rows)


def open_store(path: str | Path, mode: str = "r") -> GradientStore | ScoreStore:
    """Opens a gradient or a score store, whichever lies there.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: neither.
    """
    kind = stored_kind(Storage(path))
    return ScoreStore.open(path, mode) if kind == ScoreStore.KIND else GradientStore.open(path, mode)
