"""TarRecords: WebDataset tars as records: the files of one key are a sample, `.json` its record, others its images."""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from icons.datamodules.records.data_file import DataFile, State, content_digest
from icons.datamodules.records.source import RecordError, checked_row, decode, id_of
from icons.output import beside

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")


@dataclass
class Sample:
    """A key's files: extension -> offset and size in the shard of this number."""

    shard: int
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


class TarRecords:
    """Samples of uncompressed tar files in the order in which they stand, shard after shard.

    A sample's record is its `.json` file. Its images are the sample's own image files, in the order of their names,
    where the record names none; where it names files of the sample, these. Without an `id` of its own the record has
    its key. Tables of contents are kept in memory (some hundred bytes a sample), contents are read one at a time.

    Args:
        files: the shards.
        path: what they are called together.

    Raises:
        ValueError: a shard is damaged, or none holds a sample.
    """

    def __init__(self, files: Sequence[Path], path: Path) -> None:
        self.path, self.files = path, list(files)
        self.samples: list[Sample] = []
        self.states = [State.of(file) for file in self.files]
        for shard, file in enumerate(self.files):
            self.read_contents(shard, file)
        if not self.samples:
            raise ValueError(f"{path}: holds no file; expected a WebDataset: KEY.json, and KEY.jpg or another image")

    def read_contents(self, shard: int, file: Path) -> None:
        """The table of contents of one shard."""
        try:
            with tarfile.open(file, "r:") as opened:
                for member in opened:
                    folder, slash, name = member.name.removeprefix("./").rpartition("/")
                    stem, _, extension = name.partition(".")
                    if not member.isreg() or not stem:
                        continue
                    key = folder + slash + stem
                    if not self.samples or (self.samples[-1].key, self.samples[-1].shard) != (key, shard):
                        self.samples.append(Sample(shard, key))
                    self.samples[-1].members[extension.lower()] = (member.offset_data, member.size)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{file}: is a damaged tar ({error}); expected a whole one: copy it again") from None

    @property
    def fingerprint(self) -> str:
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(content_digest(file))
        return whole.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Any:
        return self.record(row, light=False)

    def light(self, row: int) -> Any:
        return self.record(row, light=True)

    def record(self, row: int, light: bool) -> Any:
        sample = self.samples[checked_row(row, self)]
        if "json" not in sample.members:
            raise RecordError(f"the sample {sample.key} has no .json file")
        record = decode(self.content(sample, "json"))
        if not isinstance(record, dict):
            return record
        record.setdefault("id", sample.key)
        own = sorted(name for name in sample.members if name.rpartition(".")[2] in _IMAGES)
        if not any(record.get(name) for name in ("image", "images")):
            return record | ({"images": [self.image(sample, name, light) for name in own]} if own else {})
        for name in ("image", "images"):
            value = record.get(name)
            if isinstance(value, list):
                record[name] = [self.named(sample, one, light) for one in value]
            elif value is not None:
                record[name] = self.named(sample, value, light)
        return record

    def named(self, sample: Sample, value: Any, light: bool) -> Any:
        """An image that the record names: the sample's own file, if it is one; else as it is."""
        if isinstance(value, str):
            stem, _, extension = value.rpartition("/")[2].partition(".")
            if stem == sample.key.rpartition("/")[2] and extension.lower() in sample.members:
                return self.image(sample, extension.lower(), light)
            if value.lower() in sample.members:
                return self.image(sample, value.lower(), light)
        return value

    def image(self, sample: Sample, extension: str, light: bool) -> dict[str, Any]:
        return {"path": f"{sample.key}.{extension}", "bytes": b"" if light else self.content(sample, extension)}

    def content(self, sample: Sample, extension: str) -> bytes:
        offset, size = sample.members[extension]
        return DataFile(self.files[sample.shard], self.states[sample.shard])[offset : offset + size]

    def id(self, row: int) -> str:
        try:
            return id_of(self.light(row))
        except RecordError:
            return self.samples[row].key

    def check_out(self, out: Path) -> Literal["file"]:
        if out.suffix != ".tar":
            raise ValueError(
                f"selection {out}: a selection has the form of its data, and {self.path} is a WebDataset tar; expected "
                "a .tar file"
            )
        return "file"

    def write_selection(self, rows: Sequence[int], out: Path) -> None:
        """One tar of the samples' files, as they are."""
        self.check_out(out)
        partial = beside(out)
        try:
            with tarfile.open(partial, "w:") as written:
                for row in rows:
                    sample = self.samples[checked_row(row, self)]
                    for extension in sample.members:
                        content = self.content(sample, extension)
                        member = tarfile.TarInfo(f"{sample.key}.{extension}")
                        member.size = len(content)
                        written.addfile(member, io.BytesIO(content))
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
