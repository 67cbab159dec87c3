"""`open_records`: a data file, of whatever form, as its records."""

from pathlib import Path

from icons.datamodules.records.json_file import RecordIndex
from icons.datamodules.records.source import RecordSource


def open_records(data: Path | str) -> RecordSource:
    """The records of a data file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no data.
    """
    return RecordIndex.open(Path(data))
