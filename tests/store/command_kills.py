"""Kills commands at random moments, and says how often the same line then made the undisturbed result.

`python tests/store/command_kills.py FOLDER select --kills 100`. A command runs in a child forked from a process that
has imported everything and started nothing. In each round it is killed once on one output, in every fourth up to three
times, and then left alone.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import icons.cli.export
import icons.cli.factors
import icons.cli.gradients
import icons.cli.influence
import icons.cli.report
import icons.cli.score
import icons.cli.select
import icons.cli.warmup  # noqa: F401
from icons.cli import main as icons_main
from icons.models.loading import load_model  # noqa: F401
from icons.store import GradientStore, ScoreStore

LLAVA = Path(__file__).parents[1] / "data" / "original_llava"
MODEL = [
    f"--model={LLAVA}/vicuna-tiny",
    f"--vision-tower={LLAVA}/clip",
    f"--mm-projector={LLAVA}/mm_projector.bin",
]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--num-workers=0"]
NUM_ROWS, SCORED_ROWS, DIM = 24, 400, 16


def prepare(folder: Path) -> None:
    """What the commands read: records, a warm-up, gradient stores and scores."""
    records = []
    for row in range(SCORED_ROWS):
        image = {"image": "img0.png"} if row % 3 == 0 else {"image": "gone.png"} if row % 3 == 2 else {}
        question = f"{'<image>' if image else ''}\nWhat is number {row % 4}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": ("A red bus.", "hi", "Three")[row % 3]}]
        records.append({"id": row, **image, "conversations": turns})
    folder.mkdir(parents=True)
    (folder / "all.json").write_text(json.dumps(records))
    (folder / "data.json").write_text(json.dumps(records[:NUM_ROWS]))
    random_numbers = np.random.default_rng(0)
    for name, rows in (("train", SCORED_ROWS), ("gqa", 12)):
        manifest = {"data": {"fingerprint": name}, "projector": {"kind": "count_sketch", "dim": DIM, "seed": 0}}
        store = GradientStore.create(
            folder / f"{name}.zarr", num_rows=rows, dim=DIM, chunk_rows=rows, manifest=manifest
        )
        ones = np.ones(rows, np.float32)
        values = {"gradient": random_numbers.standard_normal((rows, DIM)).astype(np.float32)}
        store.write_unit(0, values | dict.fromkeys(("norm", "loss", "tokens", "status"), ones))
    scores = ScoreStore.create(folder / "scores.zarr", num_rows=SCORED_ROWS, tasks=["gqa", "pope"])
    influence = random_numbers.standard_normal((SCORED_ROWS, 2)).astype(np.float32)
    scores.write_unit(0, influence, np.full_like(influence, 0.01), np.ones(SCORED_ROWS, np.uint8))


def fit(folder: Path, out: Path) -> list[str]:
    settings = ["--lora-rank=2", "--lora-alpha=4", "--batch-size=4", "--learning-rate=0.01", "--min-rows=1"]
    settings += ["--max-failed=1", "--epochs=3", "--lora-dropout=0.3", "--checkpoint-minutes=0"]
    return ["warmup", *MODEL, f"--data={folder}/data.json", f"--images={LLAVA}", f"--out={out}", *settings, *QUIET]


def gradients(folder: Path, out: Path) -> list[str]:
    made_from = [f"--checkpoint={folder}/warm", f"--data={folder}/data.json", f"--images={LLAVA}"]
    return ["gradients", *made_from, f"--out={out}", "--chunk-rows=2", "--batch-size=2", "--dim=64", *QUIET]


def score(folder: Path, out: Path) -> list[str]:
    made_from = [f"--checkpoint={folder}/warm", f"--data={folder}/data.json", f"--images={LLAVA}"]
    task = f"--task=gqa={folder}/data.json:{LLAVA}"
    return ["score", *made_from, task, f"--out={out}", "--chunk-rows=2", "--batch-size=2", *QUIET]


def influence(folder: Path, out: Path) -> list[str]:
    made_from = [f"--train={folder}/train.zarr", f"--task=gqa={folder}/gqa.zarr"]
    return ["influence", *made_from, f"--out={out}", "--chunk-rows=4", "--accelerator=cpu", "--devices=1"]


def select(folder: Path, out: Path) -> list[str]:
    made_from = [f"--scores={folder}/scores.zarr", f"--data={folder}/all.json"]
    return ["select", *made_from, f"--out={out}/selected.json", f"--table={out}/table.csv"]


def factors(folder: Path, out: Path) -> list[str]:
    made_from = [f"--checkpoint={folder}/warm", f"--data={folder}/data.json", f"--images={LLAVA}"]
    return ["factors", *made_from, f"--out={out}/factors.safetensors", "--batch-size=2", *QUIET]


def export(folder: Path, out: Path) -> list[str]:
    return ["export", f"--checkpoint={folder}/warm", f"--out={out}/merged"]


def report(folder: Path, out: Path) -> list[str]:
    made_from = [f"--scores={folder}/scores.zarr", f"--data={folder}/all.json", f"--images={LLAVA}"]
    return ["report", *made_from, f"--selection={folder}/chosen/selected.json", f"--out={out}/page.html", "--png"]


COMMANDS = {
    "warmup": fit,
    "gradients": gradients,
    "score": score,
    "influence": influence,
    "select": select,
    "factors": factors,
    "export": export,
    "report": report,
}
BEFORE = dict.fromkeys(["gradients", "score", "factors", "export"], (fit, "warm")) | {"report": (select, "chosen")}
"""What is made first, and where."""


def result(command: str, out: Path) -> dict[str, bytes]:
    """What a command has made, by file; without what kills leave beside, and a fit's own times."""
    files = {str(file.relative_to(out)): file for file in sorted(out.rglob("*")) if file.is_file()}
    found = {name: file.read_bytes() for name, file in files.items() if ".partial" not in name}
    if command == "warmup":
        made = json.loads(found.pop("icons.json"))
        kept = ("losses", "accuracy", "used", "settings")
        found = {name: content for name, content in found.items() if name.endswith(".safetensors")}
        found["icons.json"] = json.dumps({name: made[name] for name in kept}).encode()
    return found


def fork(words: list[str], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = icons_main(words)
        sys.stdout.flush()
        os._exit(status)
    except SystemExit as end:
        print(end, flush=True)
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(70)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def made(make: Callable[[Path, Path], list[str]], folder: Path, out: Path) -> float:
    """Runs a command undisturbed; the seconds that it took."""
    log, begun = folder / "log.txt", time.monotonic()
    status = ended(fork(make(folder, out), log))
    if status:
        sys.exit(f"{out}: the command ended with {status}: {log.read_text()[-2000:]}")
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder, command, make, moments = given.folder, given.command, COMMANDS[given.command], random.Random(given.seed)
    begun = os.fork()  # which starts what must not be started here
    if not begun:
        prepare(folder)
        os._exit(0)
    if ended(begun) or not (folder / "scores.zarr").exists():
        sys.exit("the inputs could not be made")
    if command in BEFORE:
        first, place = BEFORE[command]
        made(first, folder, folder / place)
    took = made(make, folder, folder / "whole")
    expected = result(command, folder / "whole")
    kills = rounds = equal = 0
    while kills < given.kills:
        out, killed = folder / "killed", 0
        for _ in range(moments.choice((1, 1, 1, moments.randint(2, 3)))):
            pid = fork(make(folder, out), folder / "log.txt")
            time.sleep(moments.uniform(0, took))
            os.kill(pid, signal.SIGKILL)
            status = ended(pid)
            kills, killed = kills + (status == -signal.SIGKILL), killed + (status == -signal.SIGKILL)
            if status == 0:
                took *= 0.9  # it was made on a busier machine
            if status not in (0, -signal.SIGKILL):
                print(f"round {rounds}: ended with {status}: {(folder / 'log.txt').read_text()[-500:]}", flush=True)
        if not killed:
            shutil.rmtree(out)
            continue
        made(make, folder, out)
        found = result(command, out)
        differ = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        rounds, equal = rounds + 1, equal + (not differ)
        if differ:
            print(f"round {rounds}: differ: {', '.join(differ[:9])}", flush=True)
        shutil.rmtree(out)
        print(f"{command}: {kills} kills, {rounds} results compared, {equal} equal", flush=True)
    sys.exit(rounds != equal)


if __name__ == "__main__":
    main()
