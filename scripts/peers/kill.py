"""What is lost when a tool is killed (SIGKILL) and the same line is given again?

    python scripts/peers/kill.py --task peers_task --out peers_kill --table kill.csv --python TOOL=PYTHON ...

Each line runs once undisturbed; then anew, is killed after a share of that time, and given again. The table has the CPU
seconds of the undisturbed run and of the second try, which includes the start of a process, and whether it ended well
with the same scores.
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
    ("ours", "command line, kfac"),
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


def run(line: list[str], log: Path, kill_after: float | None = None) -> tuple[float, float, int]:
    """Seconds, CPU seconds and exit status of a line with all that it starts."""
    begin, cpu = time.perf_counter(), cpu_seconds()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as opened:
        process = subprocess.Popen(line, stdout=opened, stderr=opened, start_new_session=True, env=environment)
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return time.perf_counter() - begin, cpu_seconds() - cpu, process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", type=Path, default=Path("peers_task"))
    parser.add_argument("--out", type=Path, default=Path("peers_kill"))
    parser.add_argument("--table", type=Path, default=Path("peers_kill") / "kill.csv")
    parser.add_argument("--share", type=float, default=0.7)
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
        seconds, cpu, status = run([*line, str(whole)], given.out / "whole.log")
        killed = run([*line, str(again)], given.out / "killed.log", given.share * seconds)[2]
        _, second, ended = run([*line, str(again)], given.out / "second.log")
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
