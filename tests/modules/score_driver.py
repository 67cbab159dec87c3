"""Several runs of `icons influence` on one score store at once: `python score_driver.py FOLDER --together 3`.

The children are forked from a process that has imported everything and started nothing, so that they begin together.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric

from icons.modules.scoring import Scoring


def score(folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    tasks = {"gqa": [str(folder / "gqa.zarr")]}
    scoring = Scoring([str(folder / "train.zarr")], tasks, str(folder / f"scores-{number}.zarr"), chunk_rows=4)
    scoring.run(Fabric(accelerator="cpu", devices=1))


def fork(folder: Path, number: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        score(folder, number)
        os._exit(0)
    except ValueError as error:
        os.write(1, f"{error}\n".encode())  # at once, so that lines do not mix
        os._exit(1)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--together", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    for number in range(given.rounds):
        pids = [fork(given.folder, number) for _ in range(given.together)]
        print("ended with", *[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], flush=True)


if __name__ == "__main__":
    main()
