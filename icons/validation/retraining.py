"""Retrainings: one start trained again and again on parts of the data, side by side, each of them only once."""

import contextlib
import json
import logging
import multiprocessing
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import torch
from jaxtyping import Int
from rich.console import Console

from icons.datamodules.records import open_records
from icons.interruption import RESUME, Interruption
from icons.models.warmup_folder import MANIFEST, open_warmup
from icons.output import put, whole_file
from icons.store.lease import Leases
from icons.store.storage import Storage

_LOSSES, ROWS, _FIT = "losses.json", "rows.npy", "fit"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retraining:
    """One training.

    Attributes:
        name: of its folder.
        rows: of the pool, ascending.
        seed: of the training.
    """

    name: str
    rows: Int[np.ndarray, " chosen"]
    seed: int

    @property
    def unit(self) -> int:
        """What its lease is called; from the name, so that runs with more or fewer subsets mean the same."""
        return zlib.crc32(self.name.encode())


@dataclass(frozen=True)
class Retrainer:
    """Trains in `out`, one folder per retraining, and keeps each task's loss in its `losses.json`.

    Attributes:
        data: the pool.
        out: the folder of all folders.
        settings: options of `warmup`, but for data, out and seed.
        warmup: trains one model in `out` and returns an exit status (`icons warmup`'s own function); importable by
            name, for it goes to worker processes.
    """

    data: Path
    out: Path
    settings: Mapping[str, Any]
    warmup: Callable[..., int]

    def train(self, retraining: Retraining) -> int:
        """Trains one and keeps its losses; the exit status of `icons warmup`."""
        folder = self.out / retraining.name
        with whole_file(folder / ROWS) as partial:
            np.save(partial, retraining.rows)
        file = folder / f"data{self.data.suffix}"
        open_records(self.data).write_selection(retraining.rows.tolist(), file)
        status = self.warmup(data=file, out=folder / _FIT, seed=retraining.seed, **self.settings)
        if status == 0:
            put(folder / _LOSSES, json.dumps(open_warmup(folder / _FIT).facts.losses.after))
        return status

    def losses(self, retraining: Retraining) -> dict[str, float] | None:
        """Each task's loss; None: not trained yet.

        Raises:
            ValueError: it was trained on other rows.
        """
        folder = self.out / retraining.name
        if not (folder / _LOSSES).is_file():
            return None
        if (folder / ROWS).is_file() and not np.array_equal(np.load(folder / ROWS), retraining.rows):
            raise ValueError(
                f"{folder}: was trained on other rows than it would be now; expected the same scores, data and seed as "
                "before: give another --out, or delete this folder"
            )
        losses: dict[str, float] = json.loads((folder / _LOSSES).read_text())
        return losses

    def measured(self, retraining: Retraining, measure: Literal["accuracy", "loss"]) -> dict[str, float] | None:
        """Each task's exact matches (a share) or loss after training; None: not trained yet.

        Raises:
            ValueError: it was trained on other rows.
        """
        losses = self.losses(retraining)
        if losses is None or measure == "loss":
            return losses
        manifest = json.loads((self.out / retraining.name / _FIT / MANIFEST).read_text())
        accuracy: dict[str, float] = manifest["accuracy"]["after"]
        return accuracy

    def run(self, retrainings: Sequence[Retraining], said: str = "") -> int:
        """Trains those that are neither trained nor being trained by another process; the first exit status that is
        not 0 ends it. The second time over them it waits for what a dead process on another machine has left."""
        leases = Leases(Storage(self.out, "w"))
        try:
            held = [one for one in retrainings if not self.try_one(one, leases.acquire, leases, said)]
            for one in held:
                self.try_one(one, leases.acquire_patiently, leases, said)
        except Unfinished as stop:
            return stop.status
        finally:
            leases.close()
        return 0

    def try_one(self, one: Retraining, acquire: Callable[[int], bool], leases: Leases, said: str) -> bool:
        """Trains one unless it is trained; False: another process is at it.

        Raises:
            Unfinished: the training ended with another exit status than 0.
        """
        if self.losses(one) is not None:
            return True
        if not acquire(one.unit):
            return False
        try:
            if self.losses(one) is None:  # its last owner may have finished it meanwhile
                log.info("%s%s: %s rows", one.name, said, f"{len(one.rows):,}")
                if status := self.train(one):
                    raise Unfinished(status)
        finally:
            leases.release(one.unit, done=self.losses(one) is not None)
        return True


class Unfinished(Exception):
    """A training ended with another exit status than 0."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def side_by_side(retrainer: Retrainer, retrainings: Sequence[Retraining], workers: int) -> int:
    """`Retrainer.run` in several processes at once; the highest of their exit statuses.

    A worker's output goes to OUT/worker-I.log. With GPUs each worker has one to itself, as far as there are; without,
    the workers share this process's threads.

    Raises:
        ValueError: less than one worker; or a worker failed: its last line.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers}: expected at least 1")
    if workers == 1:
        return retrainer.run(retrainings)
    threads = max(1, torch.get_num_threads() // workers)
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=work, args=(retrainer, list(retrainings), worker, threads)) for worker in range(workers)
    ]
    retrainer.out.mkdir(parents=True, exist_ok=True)
    for process in processes:
        process.start()
    with _forwarded(processes), Console(stderr=True).status("") as shown:
        while any(process.is_alive() for process in processes):
            done = sum((retrainer.out / one.name / _LOSSES).is_file() for one in retrainings)
            shown.update(f"{done:,} of {len(retrainings):,} models trained, {workers} at a time")
            time.sleep(0.1)
    statuses = [process.exitcode or 0 for process in processes]
    for worker, status in enumerate(statuses):
        if status not in (0, RESUME, -signal.SIGTERM):
            file = retrainer.out / f"worker-{worker}.log"
            last = (file.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise ValueError(f"worker {worker}: ended with exit status {status}; its log {file} ends with: {last}")
    return RESUME if any(statuses) else 0


@contextlib.contextmanager
def _forwarded(processes: Sequence[Any]) -> Iterator[None]:
    """While it lasts, SIGTERM goes on to the processes, which save and end."""
    interruption = Interruption(lambda: [process.terminate() for process in processes])
    interruption.watch()
    try:
        yield
    finally:
        interruption.give_back()


def work(retrainer: Retrainer, retrainings: list[Retraining], worker: int, threads: int) -> None:
    """One worker process; ends with the exit status of its run."""
    torch.set_num_threads(threads)
    flags = own_device(retrainer.settings.get("trainer") or {}, worker, torch.cuda.device_count())
    settings = {**retrainer.settings, "trainer": {"enable_progress_bar": False, **flags}}
    with (
        (retrainer.out / f"worker-{worker}.log").open("w", buffering=1) as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        _logged_to(output),
    ):
        try:
            status = replace(retrainer, settings=settings).run(retrainings, f" (worker {worker})")
        except (ValueError, TypeError, OSError) as error:
            print(error)
            status = 1
    raise SystemExit(status)


@contextlib.contextmanager
def _logged_to(output: TextIO) -> Iterator[None]:
    """While it lasts, what the library does is written to a file."""
    logger, handler = logging.getLogger("icons"), logging.StreamHandler(output)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def own_device(flags: Mapping[str, Any], worker: int, num_gpus: int) -> dict[str, Any]:
    """The Trainer's flags of one worker: a GPU of its own, unless the user has said otherwise.

    >>> own_device({}, 3, 2), own_device({"accelerator": "cpu"}, 3, 2), own_device({}, 3, 0)
    ({'accelerator': 'gpu', 'devices': [1]}, {'accelerator': 'cpu'}, {})
    """
    if num_gpus == 0 or "devices" in flags or flags.get("accelerator", "auto") not in ("auto", "gpu", "cuda"):
        return dict(flags)
    return {**flags, "accelerator": "gpu", "devices": [worker % num_gpus]}
