"""GradientWriter: the callback that stores per-sample gradients while `Trainer.predict` computes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from icons.choices import StoreDtype
from icons.modules.store_writer import StoreWriter, Writing
from icons.store import GradientStore


class GradientWriting(Writing, total=False):
    """What a `GradientWriter` may be told."""

    dim: int | None
    dtype: StoreDtype
    codec: str | Mapping[str, Any] | None


class GradientWriter(StoreWriter):
    """Stores the rows that a `GradientExtractor` predicts; a store that exists is gone on with.

    Units, ranks, shards, leases and resume are those of every `StoreWriter`.

    Args:
        path: the store: a folder, or a URL (s3://bucket/name).
        dim: numbers per row; default: the extractor's projector's.
        dtype: float16, float32 or int8.
        codec: compressor for the rows; default none.
        options: as for `StoreWriter`: `num_rows`, `chunk_rows` (default: chunks of 2 to 16 MB), `manifest`, `shard`,
            `retry_failed`, `mixed_batches`, `overwrite`, `queue_units`, `lease_timeout_s`.
    """

    STORE = GradientStore

    def __init__(
        self,
        path: str | Path,
        *,
        dim: int | None = None,
        dtype: StoreDtype = "float16",
        codec: str | Mapping[str, Any] | None = None,
        **options: Unpack[Writing],
    ) -> None:
        super().__init__(path, **options)
        self.dim, self.dtype, self.codec = dim, dtype, codec

    def open_or_create(self, manifest: dict[str, Any], num_rows: int) -> GradientStore:
        return GradientStore.open_or_create(
            self.path,
            num_rows=num_rows,
            dim=self.dim or manifest["projector"]["dim"] or manifest["adapter"]["parameters"],
            dtype=self.dtype,
            chunk_rows=self.chunk_rows,
            manifest=manifest,
            codec=self.codec,
            overwrite=self.overwrite,
        )
