"""DataSetRecords: a Hugging Face data set as records: a saved folder, Parquet or Arrow files, a hub name, an object."""

import hashlib
import importlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from icons.datamodules.records.cache import cache_folder
from icons.datamodules.records.data_file import State, content_digest
from icons.datamodules.records.source import RecordError, checked_row, id_of
from icons.output import beside, remove

PARQUET, ARROW = ".parquet", ".arrow"
_STATE, _SPLITS = "state.json", "dataset_dict.json"


class DataSetRecords:
    """Rows of a `datasets.Dataset`, as they are stored: images stay bytes or names and are not decoded.

    The table is memory-mapped: memory does not grow with it. Parquet files, which cannot be read row by row, become an
    Arrow table in the cache folder once.

    Args:
        dataset: a `datasets.Dataset`.
        path: where it lies, or what it is called.
        files: what its content is known by; none: the data set's own fingerprint stands for it.
    """

    def __init__(self, dataset: Any, path: Path, files: Sequence[Path] = ()) -> None:
        self.dataset, self.path, self.files = dataset, path, list(files)
        self.table = dataset.with_format("arrow")
        self.known: str | None = None
        # of Parquet the table in the cache is read
        self.states = {file: State.of(file) for file in self.files if file.suffix != PARQUET}

    @property
    def fingerprint(self) -> str:
        """Of the files' contents; of an object, its own."""
        if self.known is None:
            whole = hashlib.sha256(f"{len(self)} {self.dataset.features}".encode())
            for file in self.files:
                whole.update(content_digest(file))
            if not self.files:
                whole.update(str(self.dataset._fingerprint).encode())
            self.known = whole.hexdigest()[:16]
        return self.known

    def __len__(self) -> int:
        return int(self.dataset.num_rows)

    def __getitem__(self, row: int) -> Any:
        return self.read(row, light=False)

    def light(self, row: int) -> Any:
        return self.read(row, light=True)

    def read(self, row: int, light: bool) -> dict[str, Any]:
        for file, state in self.states.items():
            state.check(file, file)
        one = self.table[checked_row(row, self)]
        try:
            return {name: _plain(one.column(name)[0], light) for name in one.column_names}
        except ValueError as error:  # a text that is no UTF-8
            raise RecordError(f"not valid text: {error}") from None

    def id(self, row: int) -> str:
        if "id" not in self.dataset.column_names:
            return ""
        return id_of({"id": self.table[checked_row(row, self)].column("id")[0].as_py()})

    def write_selection(self, rows: Sequence[int], out: Path) -> None:
        """Parquet for `OUT.parquet`, an Arrow file for `OUT.arrow`, a saved data set for a name without these."""
        self.check_out(out)
        chosen = self.dataset.select(list(rows))
        partial = beside(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with without_bars():
                if out.suffix == PARQUET:
                    chosen.to_parquet(partial)
                elif out.suffix == ARROW:
                    _write_arrow(chosen, partial)
                else:
                    chosen.save_to_disk(partial)
            if partial.is_dir() and out.is_dir():
                shutil.rmtree(out)
            partial.replace(out)
        finally:
            remove(partial)

    def check_out(self, out: Path) -> Literal["file", "folder"]:
        kept = self.path.suffix if self.path.suffix in (PARQUET, ARROW) else ""
        if out.suffix not in (PARQUET, ARROW) and (kept or out.suffix in (".json", ".jsonl", ".tar")):
            expected = f"a {kept} file" if kept else "a folder, or a .parquet or .arrow file"
            raise ValueError(
                f"selection {out}: a selection has the form of its data, and {self.path} is a Hugging Face data set; "
                f"expected {expected}"
            )
        return "file" if out.suffix in (PARQUET, ARROW) else "folder"


def _plain(scalar: Any, light: bool) -> Any:
    """An Arrow value as JSON's types; if `light`, bytes come empty and are not read."""
    kinds = importlib.import_module("pyarrow")
    if not scalar.is_valid:
        return None
    if isinstance(scalar, kinds.StructScalar):
        return {name: _plain(value, light) for name, value in scalar.items()}
    if isinstance(scalar, kinds.ListScalar | kinds.LargeListScalar | kinds.FixedSizeListScalar):
        return [_plain(value, light) for value in scalar.values]
    if isinstance(scalar, kinds.BinaryScalar | kinds.LargeBinaryScalar) and not isinstance(
        scalar, kinds.StringScalar | kinds.LargeStringScalar
    ):
        return b"" if light else scalar.as_py()
    return scalar.as_py()


def _write_arrow(dataset: Any, path: Path) -> None:
    pyarrow = importlib.import_module("pyarrow")
    table = dataset.with_format("arrow")
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, dataset.features.arrow_schema) as writer:
        for batch in table.iter(batch_size=100):
            writer.write_table(batch)


def library(what: str = "Parquet and Hugging Face data sets need") -> Any:
    """The package `datasets`, which `what` cannot do without.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} the package datasets, which is not installed; pip install 'icons-lightning[hf]'"
        ) from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the library's progress bars."""
    bars = importlib.import_module("datasets.utils")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bars()


def open_files(files: Sequence[Path], path: Path, form: str) -> DataSetRecords:
    """Parquet or Arrow files, one after the other, as records.

    Raises:
        ValueError: they are damaged, or of different columns.
    """
    datasets = library()
    names = [str(file) for file in files]
    content = hashlib.sha256(b"".join(content_digest(file) for file in files)).hexdigest()[:16]
    try:
        with without_bars():
            if form == ARROW:
                dataset = datasets.concatenate_datasets([datasets.Dataset.from_file(name) for name in names])
            else:
                kept = str(cache_folder() / "datasets" / content)  # the library looks at names and times alone
                dataset = datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=kept)
    except Exception as error:  # the library's, pyarrow's, and whatever a damaged file leads them to
        raise ValueError(f"{path}: cannot be read as a Hugging Face data set: {_reason(error)}") from None
    return DataSetRecords(dataset, path, files)


def open_folder(folder: Path) -> DataSetRecords:
    """A folder that `save_to_disk` has written, or one of Parquet files, as the hub has them.

    Raises:
        ValueError: it holds several splits, or no data.
    """
    if (folder / _SPLITS).is_file():
        splits = ", ".join(sorted(part.name for part in folder.iterdir() if (part / _STATE).is_file()))
        raise ValueError(f"{folder}: holds the splits {splits}; expected one: give its folder")
    if (folder / _STATE).is_file():
        datasets = library()
        try:
            dataset = datasets.load_from_disk(str(folder))
        except Exception as error:
            raise ValueError(f"{folder}: cannot be read as a Hugging Face data set: {_reason(error)}") from None
        return DataSetRecords(dataset, folder, sorted(Path(file["filename"]) for file in dataset.cache_files))
    files = sorted(folder.rglob(f"*{PARQUET}"))
    if not files:
        raise ValueError(
            f"{folder}: is a folder without a data set; expected a file, what `save_to_disk` writes, or Parquet files"
        )
    named = {file.name.partition("-")[0] for file in files}
    if len(named) > 1 and named & {"train", "test", "validation", "dev", "val"}:
        raise ValueError(
            f"{folder}: holds {', '.join(sorted(named))}; expected one split: give '{folder}/**/train-*{PARQUET}'"
        )
    return open_files(files, folder, PARQUET)


def open_hub(name: str) -> DataSetRecords:
    """A data set of the hub: `owner/name`, `owner/name:config`, either with `@split` behind; the split is train.

    Raises:
        ValueError: it cannot be loaded.
    """
    datasets = library()
    where, _, split = name.partition("@")
    repository, _, config = where.partition(":")
    try:
        with without_bars():
            dataset = datasets.load_dataset(repository, config or None, split=split or "train")
    except Exception as error:
        raise ValueError(f"{name}: neither a file nor a data set that the hub gives: {_reason(error)}") from None
    return DataSetRecords(dataset, Path(name))


def _reason(error: Exception) -> str:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    return " ".join(f"{type(root).__name__}: {root}".split())[:300]
