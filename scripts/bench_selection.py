"""Measures how a selection is written: `python scripts/bench_selection.py` (2.5 GB of disk and of page cache).

Each file is indexed, and every fifth record written, in a process that has imported nothing else: its memory is theirs.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from icons.datamodules.records.json_file import RecordIndex


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--folder", type=Path, help="where the data lies meanwhile; default: a temporary folder")
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measured is not None:
        return measure(options.measured)
    print(f"# {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for suffix in ("json", "jsonl"):
            path = Path(folder) / f"data.{suffix}"
            write_data(path, int(2e9 * options.scale))
            environment = os.environ | {"ICONS_CACHE": folder}
            subprocess.run([sys.executable, __file__, "--measured", str(path)], check=True, env=environment)
            path.unlink()
    return None


def write_data(path: Path, size: int) -> None:
    """Records like LLaVA's until the file has `size` bytes."""
    turns = [{"from": "human", "value": "<image>\n" + "What is it? " * 40}, {"from": "gpt", "value": "A thing. " * 60}]
    num_rows, json_list = 0, path.suffix == ".json"
    with path.open("w") as file:
        file.write("[" if json_list else "")
        while file.tell() < size:
            comma = ",\n" if json_list and num_rows else ""
            record = {"id": f"{num_rows:012d}", "image": f"coco/{num_rows:012d}.jpg", "conversations": turns}
            file.write(comma + json.dumps(record) + ("" if json_list else "\n"))
            num_rows += 1
        file.write("]" if json_list else "")


def measure(path: Path) -> None:
    begun, imports, out = time.perf_counter(), peak_mb(), path.with_name(f"selected{path.suffix}")
    index = RecordIndex(path)
    indexed = time.perf_counter() - begun
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        index.write_selection(range(0, len(index), 5), out)
        times.append(time.perf_counter() - begun)
    size, selected = path.stat().st_size / 1e6, out.stat().st_size / 1e6
    print(f"{path.suffix}: {size:.0f} MB, {len(index):,} records: index {indexed:.1f} s;", end=" ")
    print(
        f"a selection of {selected:.0f} MB at {selected / min(times):.0f} MB/s (>= 200), best of {len(times)};", end=" "
    )
    print(f"peak memory {peak_mb():.0f} MB (<= 300), of it {imports:.0f} MB imports")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
