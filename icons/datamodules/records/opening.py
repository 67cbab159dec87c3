"""`open_records`: a data file, of whatever form, as its records. What is no data is refused in one line."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icons.datamodules.records.data_set import ARROW, PARQUET, DataSetRecords, open_files, open_folder, open_hub
from icons.datamodules.records.json_file import RecordIndex
from icons.datamodules.records.scan import EXPECTED
from icons.datamodules.records.source import RecordSource
from icons.datamodules.records.tar_file import TarRecords

_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?(@[\w.:\[\]%+-]+)?")
_FILES = (".json", ".jsonl", ".parquet", ".arrow", ".tar", ".gz", ".zst", ".csv")
_TAR_MAGIC, _TAR_PLACE = b"ustar", 257
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip -k"), b"\x28\xb5\x2f\xfd": ("Zstandard", "unzstd"), b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ\0": ("xz", "unxz -k"), b"PK\x03\x04": ("zip", "unzip"),
}  # fmt: skip


def open_records(data: Any) -> RecordSource:
    """The records of a data file.

    Args:
        data: a JSON, JSONL, Parquet, Arrow or WebDataset tar file, or a pattern of the last three (`data/*.parquet`);
            a folder that `save_to_disk` has written, or one of Parquet files; a data set of the Hugging Face hub
            (`owner/name`, `owner/name:config`, with `@split` behind); or a `datasets.Dataset`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no data.
    """
    if not isinstance(data, Path | str):
        if not all(hasattr(data, name) for name in ("with_format", "select", "features")):
            raise TypeError(f"data: got {type(data).__name__}; expected a path or a datasets.Dataset")
        return DataSetRecords(data, Path("datasets.Dataset"))
    path = Path(data)
    if path.is_dir():
        return open_folder(path)
    if path.exists():
        return _open_several([path], path)
    if any(sign in str(data) for sign in "*?["):
        root = Path(path.anchor)
        files = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
        if not files:
            raise FileNotFoundError(f"{data}: no file has such a name; {EXPECTED}")
        return _open_several(files, path)
    if _HUB.fullmatch(str(data)) and path.suffix not in _FILES:
        return open_hub(str(data))
    raise FileNotFoundError(f"{data}: no such data file; {EXPECTED}")


def _open_several(files: Sequence[Path], path: Path) -> RecordSource:
    """One file or more of one form, one after the other.

    Raises:
        ValueError: they are of several forms, or several JSON files.
    """
    forms = {_form_of(file) for file in files}
    if len(forms) > 1:
        raise ValueError(f"{path}: names files of the forms {', '.join(sorted(forms))}; expected one form")
    (form,) = forms
    if form in (PARQUET, ARROW):
        return open_files(files, path, form)
    if form == ".tar":
        return TarRecords(files, path)
    if len(files) > 1:
        raise ValueError(f"{path}: names {len(files)} JSON files; expected one: join JSONL files with `cat`")
    return RecordIndex(files[0])


def _form_of(file: Path) -> str:
    """The form of a file, told by its first bytes, whatever it is called.

    Raises:
        ValueError: it is no data, or packed.
    """
    with file.open("rb") as opened:
        head = opened.read(1 << 12)
    if head[:4] == b"PAR1":
        return PARQUET
    if head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
        return ARROW
    if head[_TAR_PLACE : _TAR_PLACE + len(_TAR_MAGIC)] == _TAR_MAGIC:
        return ".tar"
    for magic, (kind, command) in _PACKED.items():
        if head.startswith(magic):
            raise ValueError(f"{file}: is packed with {kind}, whose records cannot be reached one by one: {command} it")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{file}: is in UTF-16; expected UTF-8: iconv -f UTF-16 -t UTF-8 {file}")
    if b"\0" in head:
        raise ValueError(f"{file}: is a binary file; {EXPECTED}")
    return ".json"
