"""Retrainings: each trained once, whoever starts them and however many there are at a time."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icons.interruption import RESUME
from icons.store.lease import Leases
from icons.store.storage import Storage
from icons.validation import retraining
from icons.validation.retraining import ROWS, Retrainer, Retraining, own_device, side_by_side


class Scribe(Retrainer):
    """Trains nothing: writes down who would have, and ends as its `settings` say."""

    def train(self, retraining: Retraining) -> int:
        folder = self.out / retraining.name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "trained-by").open("a") as file:
            file.write(f"{os.getpid()}\n")
        status: Any = self.settings.get("ends", {}).get(retraining.name, 0)
        if isinstance(status, str):
            raise ValueError(status)
        if status == 0:
            np.save(folder / ROWS, retraining.rows)
            (folder / "losses.json").write_text(json.dumps({"task": float(retraining.seed)}))
        return int(status)


def never(*_: object, **__: object) -> int:
    raise AssertionError("nothing is trained here")


def several(count: int = 4) -> list[Retraining]:
    return [Retraining(f"subset-{place:03d}", np.arange(place + 1), place) for place in range(count)]


def trained(out: Path) -> list[int]:
    return [len((out / one.name / "trained-by").read_text().splitlines()) for one in several()]


def test_each_is_trained_once_and_kept(tmp_path: Path) -> None:
    scribe = Scribe(Path("pool.json"), tmp_path / "out", {}, never)
    assert scribe.run(several()) == 0
    assert scribe.run(several()) == 0
    assert trained(tmp_path / "out") == [1, 1, 1, 1]
    assert [scribe.losses(one) for one in several()] == [{"task": float(seed)} for seed in range(4)]
    assert not list((tmp_path / "out" / "status" / "lease").glob("*"))


def test_what_another_process_is_training_is_left_to_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = Leases(Storage(out, "w"))
    assert other.acquire(several()[1].unit)
    scribe = Scribe(Path("pool.json"), out, {}, never)
    assert scribe.run(several()) == 0
    assert [scribe.losses(one) is None for one in several()] == [False, True, False, False]
    other.close()
    assert scribe.run(several()) == 0
    assert trained(out) == [1, 1, 1, 1]


def test_an_interrupted_training_ends_the_run_and_is_given_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert Scribe(Path("pool.json"), out, {"ends": {"subset-001": RESUME}}, never).run(several()) == RESUME
    assert not (out / "subset-002").exists()
    assert Scribe(Path("pool.json"), out, {}, never).run(several()) == 0
    assert trained(out) == [1, 2, 1, 1]


def test_other_rows_under_the_same_name_are_refused(tmp_path: Path) -> None:
    scribe = Scribe(Path("pool.json"), tmp_path / "out", {}, never)
    assert scribe.run(several()) == 0
    with pytest.raises(ValueError, match="was trained on other rows than it would be now; expected the same scores"):
        scribe.losses(Retraining("subset-001", np.array([7]), 1))


def test_a_lease_is_named_by_the_training_and_not_by_its_place() -> None:
    assert len({one.unit for one in several(200)}) == 200
    assert several(3)[2].unit == several(9)[2].unit


@pytest.mark.slow
def test_workers_share_the_trainings(tmp_path: Path) -> None:
    out = tmp_path / "out"
    scribe = Scribe(Path("pool.json"), out, {}, never)
    assert side_by_side(scribe, several(), 2) == 0
    assert trained(out) == [1, 1, 1, 1]


def test_workers_that_fail_or_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        """A process that has ended before anybody looks."""

        exitcodes: tuple[int, ...] = ()

        def __init__(self, target: Any, args: tuple[Any, ...]) -> None:
            self.exitcode = self.exitcodes[args[2]]
            self.log = args[0].out / f"worker-{args[2]}.log"

        def start(self) -> None:
            self.log.write_text("training\nnot enough memory\n")

        def is_alive(self) -> bool:
            return False

    class Context:
        pass

    Context.Process = Process  # type: ignore[attr-defined]
    monkeypatch.setattr(retraining.multiprocessing, "get_context", lambda _: Context)
    scribe = Scribe(Path("pool.json"), tmp_path / "out", {}, never)
    Process.exitcodes = (0, RESUME)
    assert side_by_side(scribe, several(), 2) == RESUME
    Process.exitcodes = (0, 1)
    with pytest.raises(ValueError, match=r"worker 1: ended with exit status 1; .*ends with: not enough memory"):
        side_by_side(scribe, several(), 2)
    with pytest.raises(ValueError, match="--workers 0: expected at least 1"):
        side_by_side(scribe, several(), 0)


def test_a_worker_says_why_it_failed_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> int:
        raise ValueError("no such image folder")

    monkeypatch.setattr(retraining.torch, "set_num_threads", lambda _: None)
    pool = tmp_path / "pool.json"
    pool.write_text(json.dumps([{"id": row, "conversations": []} for row in range(9)]))
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit) as ended:
        retraining.work(Retrainer(pool, tmp_path / "out", {}, fails), several(), 3, 1)
    assert ended.value.code == 1
    assert (tmp_path / "out" / "worker-3.log").read_text().splitlines()[-1] == "no such image folder"


def test_devices_that_the_user_names_stay() -> None:
    assert own_device({"devices": 2}, 1, 4) == {"devices": 2}
    assert own_device({"accelerator": "gpu"}, 5, 4) == {"accelerator": "gpu", "devices": [1]}
    assert own_device({"accelerator": "mps"}, 1, 4) == {"accelerator": "mps"}
