"""Are a tool's scores the same, bit for bit, when its line is run twice, each time by a fresh process?

    python scripts/peers/repeat.py --task peers_task --out peers_repeat --table repeat.csv --python TOOL=PYTHON ...

One thread, the same machine, empty folders. What has run already is read.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from table import write

LINES = (
    ("ours", "command line"),
    ("ours", "product, kfac, exact"),
    ("bergson_peer", "build-adam"),
    ("bergson_peer", "trackstar-adam"),
    ("bergson_peer", "ekfac"),
    ("kronfluence_peer", "ekfac-heuristic"),
    ("trak_peer", "trak"),
    ("dattri_peer", "cosine, K 512"),
    ("dattri_peer", "logra"),
    ("dattri_peer", "trak"),
    ("dattri_llm_peer", "less-one"),
    ("dattri_llm_peer", "ekfac-relative"),
)


def compared(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Equal bits, and the largest difference as a share of the largest score."""
    largest = float(np.abs(one - other).max() / np.abs(one).max())
    return {"same bits": one.tobytes() == other.tobytes(), "largest difference": f"{largest:.1e}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", type=Path, default=Path("peers_task"))
    parser.add_argument("--out", type=Path, default=Path("peers_repeat"))
    parser.add_argument("--table", type=Path, default=Path("peers_repeat") / "repeat.csv")
    parser.add_argument("--python", action="append", default=[], help="TOOL=PYTHON, the interpreter of its environment")
    given = parser.parse_args()
    pythons = {"ours": sys.executable} | dict(entry.split("=", 1) for entry in given.python)
    table: list[dict[str, Any]] = []
    for tool, variant in LINES:
        if tool not in pythons:
            print(f"{tool}: left out, no --python {tool}=...", flush=True)
            continue
        scores = []
        for again in ("first", "second"):
            out = given.out.resolve() / again / tool
            file = out / "lora" / variant / "scores.npy"
            line = [pythons[tool], str(Path(__file__).parent / f"{tool}.py"), "--task", str(given.task.resolve())]
            line += ["--way", "lora", "--variant", variant, "--out", str(out)]
            if not file.exists():
                subprocess.run(line, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
            scores.append(np.load(file))
        table.append({"tool": tool.removesuffix("_peer"), "variant": variant} | compared(*scores))
        print(table[-1], flush=True)
    write(given.table, table)


if __name__ == "__main__":
    main()
