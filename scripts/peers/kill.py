"""What is lost when a tool is killed (SIGKILL) and the same line is given again?

    python scripts/peers/kill.py --task peers_task --out peers_kill --table kill.csv --python TOOL=PYTHON ...

Each line runs once undisturbed; then anew, is killed after a share of its CPU time, and given again. The table has the
CPU seconds of the undisturbed run and of the second try, which includes the start of a process, and whether it ended
well with the same scores.
"""

import argparse
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from table import write

LINES = (
    ("ours", "command line"),
    ("bergson_peer", "build-adam, as a killed run left it"),
    ("bergson_peer", "ekfac, as a killed run left it"),
    ("kronfluence_peer", "ekfac, as a killed run left it"),
    ("kronfluence_peer", "ekfac, 8 partitions, as a killed run left it"),
    ("trak_peer", "trak"),
    ("dattri_llm_peer", "gradcos, as a killed run left it"),
)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_of_group(group: int) -> float:
    """CPU seconds of a process group's processes and of those that they have waited for (Linux)."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[2]) == group:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def run(line: list[str], log: Path, kill_after: float | None = None) -> tuple[float, int]:
    """CPU seconds and exit status of a line with all that it starts; `kill_after`: CPU seconds."""
    cpu = cpu_seconds()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as opened:
        process = subprocess.Popen(line, stdout=opened, stderr=opened, start_new_session=True, env=environment)
    while kill_after is not None and process.poll() is None:
        if cpu_of_group(process.pid) > kill_after:
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.05)
    process.wait()
    return cpu_seconds() - cpu, process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", type=Path, default=Path("peers_task"))
    parser.add_argument("--out", type=Path, default=Path("peers_kill"))
    parser.add_argument("--table", type=Path, default=Path("peers_kill") / "kill.csv")
    parser.add_argument("--share", type=float, default=0.7, help="of the undisturbed run's CPU seconds")
    parser.add_argument("--python", action="append", default=[], help="TOOL=PYTHON, the interpreter of its environment")
    given = parser.parse_args()
    pythons = {"ours": sys.executable} | dict(entry.split("=", 1) for entry in given.python)
    given.out.mkdir(parents=True, exist_ok=True)
    table: list[dict[str, Any]] = []
    for tool, variant in LINES:
        if tool not in pythons:
            print(f"{tool}: left out, no --python {tool}=...", flush=True)
            continue
        line = [pythons[tool], str(Path(__file__).parent / f"{tool}.py"), "--task", str(given.task.resolve())]
        line += ["--way", "lora", "--variant", variant, "--out"]
        whole, again = given.out.resolve() / "whole" / tool, given.out.resolve() / "again" / tool
        log = given.out / f"{tool}, {variant}"
        cpu, status = run([*line, str(whole)], log.with_suffix(".whole.log"))
        killed = run([*line, str(again)], log.with_suffix(".killed.log"), given.share * cpu)[1]
        second, ended = run([*line, str(again)], log.with_suffix(".second.log"))
        scores = [folder / "lora" / variant / "scores.npy" for folder in (whole, again)]
        same = all(file.exists() for file in scores) and np.array_equal(*map(np.load, scores))
        table.append({
            "tool": tool.removesuffix("_peer"), "variant": variant, "exit statuses": f"{status}, {killed}, {ended}",
            "CPU seconds": f"{cpu:.1f}", "second try": f"{second:.1f}", "same scores": same,
        })  # fmt: skip
        print(table[-1], flush=True)
    write(given.table, table)


if __name__ == "__main__":
    main()
