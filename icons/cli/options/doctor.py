"""Options of `icons doctor`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Prints versions, accelerator, attention kernels and disk, and runs a self-test on a tiny model.

    $ icons doctor
    """

    folder: Path = Path()
    """where stores will lie; its free space is shown"""
