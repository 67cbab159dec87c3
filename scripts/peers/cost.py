"""What the tools cost per 1,000 rows: CPU seconds, bytes, peak memory; the start of a process does not count.

    python scripts/peers/cost.py --task peers_task --out peers_cost --table cost.csv --python TOOL=PYTHON ...

Each variant runs on two pools of different length, on one thread; the slope between the two is what rows cost. The
whole round is done several times, and the smallest CPU time of each counts: a busy machine only ever adds.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from table import write
from task import Task

PLAIN = ("plain", "forward and backward")
PLANS: list[tuple[str, str, tuple[int, int]]] = [  # tool, variant, rows of the two pools
    (*PLAIN, (1000, 4000)),
    ("ours", "command line", (1000, 4000)),
    ("ours", "cosine, Adam, exact", (1000, 4000)),
    ("ours", "product, kfac, exact", (1000, 4000)),
    ("bergson_peer", "build-adam", (1000, 4000)),
    ("bergson_peer", "ekfac", (1000, 4000)),
    ("kronfluence_peer", "ekfac-heuristic", (1000, 4000)),
    ("trak_peer", "trak-2048", (32, 128)),
    ("original", "dense signs", (8, 24)),
    ("bergson_peer", "build-adam-5120", (32, 128)),
]


def resized(task: Task, rows: int, folder: Path) -> Task:
    """The same task with so many rows in its pool, some of them several times if need be."""
    if not (folder / "settings.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        queries = 8 if rows >= 1000 else 1
        for name in ("start", "lora", "full"):
            (folder / name).symlink_to(task.folder.resolve() / name)
        for name in ("tokens", "pool"):
            content = json.loads((task.folder / f"{name}.json").read_text())
            pool = content if name == "pool" else content["pool"]
            longer = (pool * (rows // len(pool) + 1))[:rows]
            few = {kind: part[:queries] for kind, part in content.items()} if name == "tokens" else {}
            (folder / f"{name}.json").write_text(json.dumps(few | {"pool": longer} if name == "tokens" else longer))
        for name in task.names:
            (folder / f"{name}.json").write_text(
                json.dumps(json.loads((task.folder / f"{name}.json").read_text())[:queries])
            )
        (folder / "settings.json").write_text((task.folder / "settings.json").read_text())
    return Task(folder)


def measured(given: argparse.Namespace, pythons: dict[str, str], again: int, plan: Any) -> list[dict[str, float]]:
    """The costs of one variant on both pools; what is measured already is read."""
    tool, variant, sizes = plan
    found = []
    for rows in sizes:
        out = given.out.resolve() / f"round-{again}" / f"{rows}"
        file = out / tool / "lora" / variant / "cost.json"
        if not file.exists():
            task = resized(Task(given.task), rows, given.out.resolve() / f"task-{rows}")
            line = [pythons[tool], str(Path(__file__).parent / f"{tool}.py"), "--task", str(task.folder)]
            line += ["--way", "lora", "--variant", variant, "--out", str(out / tool)]
            subprocess.run(line, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
        found.append(json.loads(file.read_text()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", type=Path, default=Path("peers_task"))
    parser.add_argument("--out", type=Path, default=Path("peers_cost"))
    parser.add_argument("--table", type=Path, default=Path("peers_cost") / "cost.csv")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--python", action="append", default=[], help="TOOL=PYTHON, the interpreter of its environment")
    given = parser.parse_args()
    pythons = dict.fromkeys(("plain", "ours", "original"), sys.executable)
    pythons |= dict(entry.split("=", 1) for entry in given.python)
    rounds: dict[Any, list[list[dict[str, float]]]] = {}
    for again in range(given.rounds):
        for plan in PLANS:
            if plan[0] in pythons:
                rounds.setdefault(plan, []).append(measured(given, pythons, again, plan))
    table: list[dict[str, Any]] = []
    base = 0.0
    for (tool, variant, sizes), several in rounds.items():
        short, long = (min(costs[place]["cpu_seconds"] for costs in several) for place in (0, 1))
        seconds = 1000 * (long - short) / (sizes[1] - sizes[0])
        base = seconds if (tool, variant) == PLAIN else base
        stored = 1000 * (several[0][1]["bytes"] - several[0][0]["bytes"]) / (sizes[1] - sizes[0])
        table.append({
            "tool": tool.removesuffix("_peer"), "variant": variant, "rows": f"{sizes[0]} and {sizes[1]}",
            "CPU seconds per 1,000 rows": f"{seconds:.2f}", "ratio to forward and backward": f"{seconds / base:.1f}",
            "MB on disk per 1,000 rows": f"{stored / 1e6:.1f}",
            "peak MB": f"{min(costs[1]['peak_mb'] for costs in several):.0f}",
        })  # fmt: skip
        print(table[-1], flush=True)
    write(given.table, table)


if __name__ == "__main__":
    main()
