"""The ranks of a run end as one: none before the others, and all with the same status, which is true."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from icons.modules.ranks import Outcome, worst
from icons.store import GradientStore
from icons.store.verify import verify

SCRIPT = Path(__file__).parent / "toy_predict.py"
UNEVEN = ("--rows", "40", "--chunk-rows", "4", "--pause-s", "0.05")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(path: Path, ranks: int, launcher: str, *options: str) -> "list[subprocess.Popen[str]]":
    """A run of several ranks: one process that starts the others, or, as SLURM does, each of them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    script = [str(SCRIPT), str(path), *UNEVEN, *options]
    if launcher == "own":
        command = [sys.executable, *script, "--devices", str(ranks)]
        return [subprocess.Popen(command, env=environment, text=True, **pipes)]
    if launcher == "torchrun":
        run = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            "--master-port",
            free_port(),
        ]
        return [subprocess.Popen([*run, *script, "--devices", str(ranks)], env=environment, text=True, **pipes)]
    job = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "icons", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": free_port()}
    job |= {"SLURM_NTASKS": str(ranks), "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": str(ranks), "SLURM_LOCALID": "0"}
    tasks = [{"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(ranks)]
    command = [sys.executable, *script, "--nodes", str(ranks)]
    return [subprocess.Popen(command, env=environment | job | task, text=True, **pipes) for task in tasks]


def ended(processes: "list[subprocess.Popen[str]]") -> tuple[list[int], str]:
    said = [process.communicate(timeout=240)[0] for process in processes]
    return [process.returncode for process in processes], "\n".join(said)


def until_written(path: Path, unit: int, processes: "list[subprocess.Popen[str]]") -> None:
    while not (path / f"status/c/{unit}").exists():
        assert processes[0].poll() is None
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(int(os.environ.get("ICONS_RANK_RUNS", "2"))))
def test_all_ranks_wait_for_the_slowest(tmp_path: Path, number: int) -> None:
    """`ICONS_RANK_RUNS=20` makes that many runs."""
    ranks, launcher = [(2, "torchrun"), (2, "own"), (3, "torchrun"), (3, "own"), (2, "slurm")][number % 5]
    status, said = ended(start(tmp_path / "s", ranks, launcher, "--slow-rank", str(number // 2 % ranks)))
    assert set(status) == {0}, said
    store = GradientStore.open(tmp_path / "s")
    assert store.missing() == [] and list(verify(store)) == [] and store.storage.list("status/lease") == []


@pytest.mark.slow
def test_a_rank_that_fails_lets_the_others_do_their_work_and_all_end_with_1(tmp_path: Path) -> None:
    status, said = ended(start(tmp_path / "s", 2, "slurm", "--failing-rank", "1"))
    assert status == [1, 1] and "another rank of this run has ended with an error: out of memory" in said, said
    store = GradientStore.open(tmp_path / "s")
    assert all(unit % 2 for unit in store.missing()) and store.missing(), "rank 0's units are done"


@pytest.mark.slow
def test_a_signal_to_one_rank_gives_all_the_status_75(tmp_path: Path) -> None:
    tasks = start(tmp_path / "s", 2, "slurm")
    until_written(tmp_path / "s", 1, tasks)
    tasks[1].send_signal(signal.SIGUSR1)
    status, said = ended(tasks)
    assert status == [75, 75], said
    store = GradientStore.open(tmp_path / "s")
    assert store.missing() != [] and list(verify(store)) == [] and not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_rank_that_was_killed_is_an_error_for_those_that_wait_for_it(tmp_path: Path) -> None:
    tasks = start(tmp_path / "s", 2, "slurm", "--slow-rank", "1")
    until_written(tmp_path / "s", 0, tasks)
    tasks[1].kill()
    status, said = ended(tasks)
    assert status == [1, -9] and "another rank of this run has died; run the same line again" in said, said


def test_an_error_counts_more_than_an_interruption_and_that_more_than_success() -> None:
    assert worst([Outcome(75), Outcome(), Outcome(1, "why"), Outcome(130)]) == Outcome(1, "why")
    assert worst([Outcome(), Outcome(75), Outcome()]) == Outcome(75)
    assert worst([Outcome(), Outcome()]) == Outcome()
