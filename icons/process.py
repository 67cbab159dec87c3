"""Which process: how it is named in files, so that others can tell whether it is gone."""

import hashlib
import os
import platform
from pathlib import Path


def machine() -> str:
    """Names the machine within which a process id means one process: host, boot and process namespace."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = [boot.read_text().strip() if boot.exists() else "", str(namespace.readlink()) if namespace.exists() else ""]
    return "/".join([platform.node(), *known])


def start_time(pid: int) -> str:
    """When a process began, so that a number used again is not taken for it; empty: there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return "" if Path("/proc/self").exists() else _without_proc(pid)
    return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended: only its parent has not looked yet


def _without_proc(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    return "running"


def process_mark() -> str:
    """This process's name in the names of files."""
    if os.getpid() not in _marks:
        _marks.clear()
        _marks[os.getpid()] = f"{_machine_mark()}-{os.getpid()}-{start_time(os.getpid())}"
    return _marks[os.getpid()]


def is_gone(mark: str) -> bool:
    """Whether the process of a mark is known to have ended; nothing is known of another machine's.

    >>> is_gone(process_mark()), is_gone("00000000-1-1")
    (False, False)
    """
    where, pid, started = mark.split("-")
    return where == _machine_mark() and start_time(int(pid)) != started


_marks: dict[int, str] = {}  # of this process alone: a fork has another


def _machine_mark() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:8]
