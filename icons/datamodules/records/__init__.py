"""Data files of every form as records by row: JSON and JSON Lines, Hugging Face data sets, WebDataset tars."""

from icons.datamodules.records.json_file import RecordIndex
from icons.datamodules.records.opening import open_records
from icons.datamodules.records.source import RecordError, RecordSource

__all__ = ["RecordError", "RecordIndex", "RecordSource", "open_records"]
