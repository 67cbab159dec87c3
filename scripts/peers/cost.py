"""What the tools cost per 1,000 rows: CPU seconds, bytes, peak memory; the start of a process does not count.

    python scripts/peers/cost.py --task peers_task --out peers_cost --table cost.csv --python TOOL=PYTHON ...

Each variant runs on two pools of different length, on one thread; the slope between the two is what rows cost.
Before and after the variants of each tool the plain pass runs again, and the mean of these two is what their slopes
are divided by, so that a machine that slows down on the way does so for both. The whole round is done several times:
the table has the mean of the rounds, and each of them as a ratio.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from table import write
from task import Task

PLAIN = ("plain", "forward and backward")
SOME, FEW, HARDLY_ANY = (250, 1000), (32, 128), (8, 24)
Plan = tuple[str, str, tuple[int, int] | None]
"""Tool, variant, and rows of its two pools where it is too slow for the others'."""
LORA: list[Plan] = [
    ("ours", "command line", None),
    ("ours", "command line, its own batches", None),
    ("ours", "command line, 2,048 tokens", None),
    ("ours", "command line, kfac", None),
    ("ours", "cosine, Adam, exact", None),
    ("ours", "product, kfac, exact", None),
    ("bergson_peer", "build-adam", None),
    ("bergson_peer", "build-adam-10", None),
    ("bergson_peer", "build-adam-5120", SOME),
    ("bergson_peer", "ekfac", None),
    ("kronfluence_peer", "ekfac-heuristic", None),
    ("dattri_llm_peer", "less-one", None),
    ("dattri_llm_peer", "gradcos-10", None),
    ("dattri_llm_peer", "ekfac-relative", None),
    ("dattri_peer", "cosine, K 512", SOME),
    ("dattri_peer", "cosine, K 5120", SOME),
    ("dattri_peer", "logra", SOME),
    ("dattri_peer", "logra-100", SOME),
    ("dattri_peer", "trak", SOME),
    ("trak_peer", "trak-2048", FEW),
    ("trak_peer", "trak-5120", FEW),
    ("original", "dense signs", HARDLY_ANY),
]
FULL: list[Plan] = [
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
        for name in ("start", "lora", "full", "images", "images.pt"):
            if (task.folder / name).exists():
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


@dataclass(frozen=True)
class Cost:
    """What a variant costs per 1,000 rows; its peak on the longer pool."""

    seconds: float
    megabytes: float
    peak_mb: float


def measured(given: argparse.Namespace, python: str, plan: Plan, place: Path) -> Cost:
    """The slope between both pools; what is measured already is read."""
    tool, variant, _ = plan
    sizes, found = sizes_of(plan, given.rows), []
    for rows in sizes:
        out = place / f"{rows}"
        file = out / tool / given.way / variant / "cost.json"
        if not file.exists():
            task = resized(Task(given.task), rows, given.out.resolve() / f"task-{rows}")
            line = [python, str(Path(__file__).parent / f"{tool}.py"), "--task", str(task.folder)]
            line += ["--way", given.way, "--variant", variant, "--out", str(out / tool)]
            subprocess.run(line, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
        found.append(json.loads(file.read_text()))
    return Cost(*per_1000_rows(found, sizes), found[1]["peak_mb"])


def sizes_of(plan: Plan, usual: tuple[int, int]) -> tuple[int, int]:
    """Of a variant's two pools: the smaller ones of its own and the others'."""
    return min(plan[2] or usual, usual, key=max)


def per_1000_rows(costs: Sequence[Mapping[str, float]], sizes: tuple[int, int]) -> tuple[float, float]:
    """CPU seconds and MB on disk."""
    short, long = costs
    more = (sizes[1] - sizes[0]) / 1000
    return (long["cpu_seconds"] - short["cpu_seconds"]) / more, (long["bytes"] - short["bytes"]) / more / 1e6


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
    given.rows = tuple(given.rows)
    pythons = dict.fromkeys(("plain", "ours", "original"), sys.executable)
    pythons |= dict(entry.split("=", 1) for entry in given.python)
    plans = [
        plan for plan in (LORA if given.way == "lora" else FULL)
        if plan[0] in pythons and plan[1] not in given.leave_out
    ]  # fmt: skip
    costs: dict[Plan, list[tuple[Cost, float]]] = {}
    plain: list[Cost] = []
    for again in range(given.rounds):
        place = given.out.resolve() / f"round-{again}"

        def base(number: int, place: Path = place) -> Cost:
            plain.append(measured(given, pythons["plain"], (*PLAIN, None), place / f"plain-{number}"))
            return plain[-1]

        before = base(0)
        for number, (_, own) in enumerate(groupby(plans, key=lambda plan: plan[0]), start=1):
            found = [(plan, measured(given, pythons[plan[0]], plan, place)) for plan in own]
            after = base(number)
            for plan, cost in found:
                costs.setdefault(plan, []).append((cost, cost.seconds / mean([before.seconds, after.seconds])))
            before = after
    table = [
        row(given, (*PLAIN, None), [(cost, cost.seconds / mean(each.seconds for each in plain)) for cost in plain])
    ]
    table += [row(given, plan, each) for plan, each in costs.items()]
    write(given.table, table)


def row(given: argparse.Namespace, plan: Plan, each: Sequence[tuple[Cost, float]]) -> dict[str, Any]:
    """A line of the table: means, and the ratio of each measurement."""
    tool, variant, _ = plan
    sizes = sizes_of(plan, given.rows)
    line = {
        "way": given.way, "tool": tool.removesuffix("_peer"), "variant": variant, "rows": f"{sizes[0]} and {sizes[1]}",
        "CPU seconds per 1,000 rows": f"{mean(cost.seconds for cost, _ in each):.2f}",
        "ratio to forward and backward": f"{mean(ratio for _, ratio in each):.2f}",
        "ratio of each": " ".join(f"{ratio:.2f}" for _, ratio in each),
        "MB on disk per 1,000 rows": f"{each[0][0].megabytes:.1f}",
        "peak MB": f"{min(cost.peak_mb for cost, _ in each):.0f}",
    }  # fmt: skip
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
