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
TRAK_ROWS, ORIGINAL_ROWS = (32, 128), (8, 24)
Plan = tuple[str, str, tuple[int, int] | None]
"""Tool, variant, and rows of its two pools where it is too slow for the others'."""
LORA: list[Plan] = [
    (*PLAIN, None),
    ("ours", "command line", None),
    ("ours", "command line, kfac", None),
    ("ours", "cosine, Adam, exact", None),
    ("ours", "product, kfac, exact", None),
    ("bergson_peer", "build-adam", None),
    ("bergson_peer", "build-adam-10", None),
    ("bergson_peer", "build-adam-5120", (100, 400)),
    ("bergson_peer", "ekfac", None),
    ("kronfluence_peer", "ekfac-heuristic", None),
    ("dattri_llm_peer", "less-one", None),
    ("dattri_llm_peer", "ekfac-relative", None),
    ("trak_peer", "trak-2048", TRAK_ROWS),
    ("original", "dense signs", ORIGINAL_ROWS),
]
FULL: list[Plan] = [
    (*PLAIN, None),
    ("ours", "cosine, Adam, K 5120", None),
    ("ours", "cosine, Adam, exact", None),
    ("ours", "product, kfac, exact", None),
    ("bergson_peer", "build-adam", None),
    ("bergson_peer", "ekfac", None),
    ("kronfluence_peer", "ekfac-heuristic", None),
    ("dattri_llm_peer", "less-one", None),
    ("dattri_llm_peer", "ekfac-relative", None),
]


def resized(task: Task, rows: int, folder: Path) -> Task:
    """The same task with so many rows in its pool, some of them several times if need be."""
    if not (folder / "settings.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        queries = 8 if rows >= 100 else 1
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


def measured(given: argparse.Namespace, pythons: dict[str, str], again: int, plan: Plan) -> list[dict[str, float]]:
    """The costs of one variant on both pools; what is measured already is read."""
    tool, variant, sizes = plan
    found = []
    for rows in sizes or given.rows:
        out = given.out.resolve() / f"round-{again}" / f"{rows}"
        file = out / tool / given.way / variant / "cost.json"
        if not file.exists():
            task = resized(Task(given.task), rows, given.out.resolve() / f"task-{rows}")
            line = [pythons[tool], str(Path(__file__).parent / f"{tool}.py"), "--task", str(task.folder)]
            line += ["--way", given.way, "--variant", variant, "--out", str(out / tool)]
            subprocess.run(line, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
        found.append(json.loads(file.read_text()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", type=Path, default=Path("peers_task"))
    parser.add_argument("--out", type=Path, default=Path("peers_cost"))
    parser.add_argument("--table", type=Path, default=Path("peers_cost") / "cost.csv")
    parser.add_argument("--way", choices=("lora", "full"), default="lora")
    parser.add_argument("--rows", type=int, nargs=2, default=(1000, 4000), help="of the two pools")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--leave-out", nargs="*", default=[], help="variants")
    parser.add_argument("--python", action="append", default=[], help="TOOL=PYTHON, the interpreter of its environment")
    given = parser.parse_args()
    pythons = dict.fromkeys(("plain", "ours", "original"), sys.executable)
    pythons |= dict(entry.split("=", 1) for entry in given.python)
    rounds: dict[Plan, list[list[dict[str, float]]]] = {}
    for again in range(given.rounds):
        for plan in LORA if given.way == "lora" else FULL:
            if plan[0] in pythons and plan[1] not in given.leave_out:
                rounds.setdefault(plan, []).append(measured(given, pythons, again, plan))
    table: list[dict[str, Any]] = []
    base = 0.0
    for (tool, variant, own), several in rounds.items():
        sizes = own or given.rows
        short, long = (min(costs[place]["cpu_seconds"] for costs in several) for place in (0, 1))
        seconds = 1000 * (long - short) / (sizes[1] - sizes[0])
        base = seconds if (tool, variant) == PLAIN else base
        stored = 1000 * (several[0][1]["bytes"] - several[0][0]["bytes"]) / (sizes[1] - sizes[0])
        table.append({
            "way": given.way, "tool": tool.removesuffix("_peer"), "variant": variant,
            "rows": f"{sizes[0]} and {sizes[1]}",
            "CPU seconds per 1,000 rows": f"{seconds:.2f}", "ratio to forward and backward": f"{seconds / base:.1f}",
            "MB on disk per 1,000 rows": f"{stored / 1e6:.1f}",
            "rounds": len(several), "peak MB": f"{min(costs[1]['peak_mb'] for costs in several):.0f}",
        })  # fmt: skip
        print(table[-1], flush=True)
    write(given.table, table)


if __name__ == "__main__":
    main()
