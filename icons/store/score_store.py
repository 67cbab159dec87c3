"""ScoreStore: each row's influence on each task, with its standard error."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from icons.batch import Status
from icons.partition import Partition
from icons.store.layout import Column
from icons.store.manifest import ScoreManifest
from icons.store.row_store import RowStore
from icons.terminal import counted

if TYPE_CHECKING:
    import pandas
    import xarray

_SCORE_CHUNK_ROWS = 1 << 16
_SCALARS = ("norm", "loss", "tokens")


class ScoreStore(RowStore):
    """A score store; `open` one, or `create` it.

    Attributes:
        influence, stderr: `[N, S]` float32, NaN for a row that has none.
        status: `[N]` uint8, as in the gradient store that the scores come from.
        tasks: names of the S tasks.
        manifest: the sources' manifests and the settings; `facts`, what this version reads of it.
    """

    KIND = "score"
    FIELDS = ("influence", "stderr", "norm", "loss", "tokens", "status")

    def encode(
        self, results: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Results (`FIELDS`) as this store's arrays, in new memory; a row that is not done has no score."""
        values = {name: np.array(results[name], dtype=self.arrays[name].dtype) for name in self.FIELDS}
        failed = values["status"] != Status.DONE
        values["influence"][failed] = values["stderr"][failed] = np.nan
        return values

    def __init__(self, storage: Any, group: zarr.Group) -> None:
        super().__init__(storage, group)
        self.influence, self.stderr = self.arrays["influence"], self.arrays["stderr"]
        self.tasks: list[str] = list(group.attrs["tasks"])  # type: ignore[arg-type]

    @property
    def facts(self) -> ScoreManifest:
        return ScoreManifest.read(self.manifest, f"store {self.path}")

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        num_rows: int,
        tasks: Sequence[str],
        manifest: Mapping[str, Any] | None = None,
        chunk_rows: int | None = None,
        extra: Mapping[str, tuple[str, Sequence[tuple[str, int]]]] | None = None,
        attributes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> "ScoreStore":
        """Makes an empty store.

        Args:
            path: a folder that is new or empty, or a URL.
            num_rows: rows of the training store.
            tasks: names, one per column.
            manifest: the sources' manifests and the settings.
            chunk_rows: rows per write unit; default 65,536, or all.
            extra: further arrays: name -> (dtype, dimensions after the row with their lengths), for example
                `{"norm": ("float32", []), "pairwise_gqa": ("float32", [("validation_gqa", 500)])}`. Floats start as
                NaN, integers as 0.
            attributes: further attributes of the group, beside `icons` and `tasks`.
            overwrite: also beside files that are not a store's; they stay.

        Raises:
            ValueError: no rows, no tasks, a task named twice, or files there that are not a store's.
            FileExistsError: a store is there.
        """
        tasks = list(tasks)
        if num_rows < 1 or not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"store {path}: got num_rows={num_rows}, tasks={tasks}; expected rows, and distinct tasks")
        by_task = (("task", len(tasks)),)
        columns = {"influence": Column("float32", np.nan, by_task), "stderr": Column("float32", np.nan, by_task)}
        for name, (dtype, dimensions) in (extra or {}).items():
            fill = np.nan if np.dtype(dtype).kind == "f" else 0
            columns[name] = Column(dtype, fill, tuple((dimension, length) for dimension, length in dimensions))
        columns["status"] = Column("uint8", 0)
        partition = Partition(num_rows, chunk_rows or min(_SCORE_CHUNK_ROWS, num_rows))
        named = {"tasks": tasks, **(attributes or {})}
        return cls._create(path, partition, columns, manifest or {}, named, overwrite=overwrite)

    def write_unit(
        self, unit: int, influence: np.ndarray, stderr: np.ndarray, status: np.ndarray, **extra: np.ndarray
    ) -> None:
        """Writes one unit: scores, the extra arrays, then `status`. A row of status 0 keeps its unit among the missing.

        Raises:
            ValueError: a shape is not that of the unit, or an array is missing or unknown.
        """
        values = {"influence": influence, "stderr": stderr, **extra, "status": status}
        self.write_columns(unit, {name: np.asarray(value) for name, value in values.items()})

    def to_pandas(self) -> "pandas.DataFrame":
        """A table with a line per row: each task's influence under its name, `stderr_TASK`, `status` in words.

        Raises:
            ValueError: pandas is not installed.
        """
        table: dict[str, Any] = {}
        for prefix, array in (("", self.influence), ("stderr_", self.stderr)):
            values = np.asarray(array[:])
            table |= {f"{prefix}{task}": values[:, column] for column, task in enumerate(self.tasks)}
        table |= {name: np.asarray(self.arrays[name][:]) for name in _SCALARS if name in self.arrays}
        names = {status.value: status.name.lower() for status in Status}
        table["status"] = [names.get(code, str(code)) for code in self.statuses().tolist()]
        frame = _module("pandas", "table").DataFrame(table)
        return frame.rename_axis("row")

    def to_xarray(self, ids: Sequence[str] | None = None) -> "xarray.Dataset":
        """The store with names for its coordinates, read as it is used: `to_xarray().sel(task="gqa")`.

        Args:
            ids: of the records, row by row; they become a coordinate `id` along the rows.

        Raises:
            ValueError: xarray is not installed; another number of ids than rows.
        """
        if ids is not None and len(ids) != self.num_rows:
            raise ValueError(f"ids: got {len(ids)}; expected {self.num_rows}, one for each row")
        data = _module("xarray", "table").open_zarr(self.group.store, consolidated=False)
        named: dict[str, Any] = {"task": self.tasks, "row": np.arange(self.num_rows)}
        return data.assign_coords(named if ids is None else named | {"id": ("row", list(ids))})

    def __repr__(self) -> str:
        counts = self.counts()
        return (
            f"ScoreStore({self.path!r})\n"
            f"  rows   {self.num_rows:,} x {counted(len(self.tasks), 'task')} ({', '.join(self.tasks)})\n"
            f"  done   {counts['done']:,}   failed {counts['failed']:,}   missing {counts['missing']:,}"
        )


def _module(name: str, extra: str) -> Any:
    """A package that only an extra brings.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} is not installed; pip install 'icons-lightning[{extra}]'") from error
