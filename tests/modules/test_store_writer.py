"""`Trainer.predict` fills the same store, bit for bit, on one rank or several, one node or two, whole or in shards."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_predict as toy

from icons.modules.gradient_writer import GradientWriter
from icons.store import GradientStore
from icons.store.lease import Holder
from icons.store.verify import verify

SCRIPT = Path(__file__).parent / "toy_predict.py"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*srun.*"),
]


def files(path: Path) -> dict[str, bytes]:
    """The arrays, byte for byte; not the group's file, in which the settings of the run stand."""
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    found.pop("zarr.json")
    return {name: content for name, content in found.items() if not name.endswith(".partial")}


def units_of(writer: GradientWriter) -> list[int]:
    assert writer.plan is not None
    return list(writer.plan.units)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "one"
    toy.predict(str(path), rows=100, chunk_rows=8)
    return path


def run(path: Path, *options: str, launcher: tuple[str, ...] = (), **variables: str) -> "subprocess.Popen[str]":
    command = [*(launcher or (sys.executable,)), str(SCRIPT), str(path), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: "subprocess.Popen[str]", status: int = 0) -> str:
    output = process.communicate(timeout=240)[0]
    assert process.returncode == status, output
    return output


def test_one_rank_stores_every_row_with_its_status(one_rank: Path) -> None:
    store = GradientStore.open(one_rank)
    assert store.counts() == {"done": 85, "failed": 15, "missing": 0} and list(verify(store)) == []
    data, extractor = toy.ToyData(100), toy.ToyExtractor()
    for row in (0, 1, 50, 99):
        alone = extractor.predict_step(data.collate([row]), 0)
        np.testing.assert_allclose(store.rows([row]), alone["gradient"].numpy(), atol=1e-3)
    assert {name: store.manifest[name]["fingerprint"] for name in ("data", "model", "adapter")} == {
        "data": "toy-0",
        "model": "toy",
        "adapter": "toy",
    }
    assert store.manifest["versions"]["torch"] == torch.__version__ and store.manifest["settings"]["shards"] == 1


def test_a_finished_store_is_left_as_it_is(one_rank: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in one_rank.rglob("*") if file.is_file()}
    assert units_of(toy.predict(str(one_rank), rows=100)) == []
    assert {file: file.stat().st_mtime_ns for file in one_rank.rglob("*") if file.is_file()} == before


def test_shards_that_do_not_know_of_each_other_fill_the_same_store(tmp_path: Path, one_rank: Path) -> None:
    for shard in ("2/3", "0/3", "1/3"):
        toy.predict(str(tmp_path / "s"), rows=100, chunk_rows=8, shard=shard)
    assert files(tmp_path / "s") == files(one_rank)
    assert GradientStore.open(tmp_path / "s").manifest["settings"]["shards"] == 3


def test_units_marked_as_not_written_are_computed_again_and_no_others(tmp_path: Path, one_rank: Path) -> None:
    toy.predict(str(tmp_path / "s"), rows=100, chunk_rows=8)
    GradientStore.open(tmp_path / "s", "r+").unwrite([3, 7])
    assert units_of(toy.predict(str(tmp_path / "s"), rows=100)) == [3, 7]
    assert files(tmp_path / "s") == files(one_rank)


def test_failed_rows_are_retried_when_asked(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    toy.predict(path, rows=40, chunk_rows=8)
    mended = toy.ToyData(40, broken=frozenset({14}))
    assert units_of(toy.predict(path, rows=40, data=mended)) == []
    toy.predict(path, rows=40, data=mended, retry_failed=True)
    store = GradientStore.open(path)
    assert store.counts() == {"done": 39, "failed": 1, "missing": 0} and store.failed_units() == [1]


def test_a_data_file_that_has_changed_is_an_error_before_anything_is_computed(one_rank: Path) -> None:
    with pytest.raises(ValueError, match=r"data.fingerprint: the store .* has 'toy-0', this run has 'toy-1'"):
        toy.predict(str(one_rank), rows=100, data=toy.ToyData(100, seed=1))


def limited(batch_size: int, max_tokens: int | None) -> Any:
    data = toy.ToyData(40, batch_size=batch_size)
    data.max_tokens = max_tokens
    return data


@pytest.fixture
def half(tmp_path: Path) -> str:
    """A store of which a shard has not yet computed its half."""
    toy.predict(str(tmp_path / "half"), rows=40, chunk_rows=8, shard="0/2")
    return str(tmp_path / "half")


@pytest.mark.parametrize(("batch_size", "max_tokens"), [(3, None), (4, 64)])
def test_other_batches_are_refused_since_they_change_the_last_bits(
    half: str, batch_size: int, max_tokens: int | None
) -> None:
    asked = f"'batch_size': {batch_size}, 'max_tokens': {max_tokens}"
    begun = "'batch_size': 4, 'max_tokens': None"
    with pytest.raises(
        ValueError, match=rf"batches: the store .* has {{{begun}}}, this run has {{{asked}}}; .*--mixed"
    ):
        toy.predict(half, rows=40, data=limited(batch_size, max_tokens))
    assert len(GradientStore.open(half).missing()) == 2


def test_mixed_batches_go_on_and_the_manifest_says_so(half: str, tmp_path: Path) -> None:
    toy.predict(half, rows=40, data=limited(3, None), mixed_batches=True)
    store = GradientStore.open(half)
    assert store.missing() == [] and store.manifest["batches"] == "mixed" and list(verify(store)) == []
    toy.predict(str(tmp_path / "whole"), rows=40, chunk_rows=8)
    np.testing.assert_allclose(
        store.rows(slice(None)), GradientStore.open(tmp_path / "whole").rows(slice(None)), rtol=1e-3
    )
    assert units_of(toy.predict(half, rows=40)) == []  # nothing to do: any batches will do


def test_workers_and_queue_are_free_on_a_resume(half: str) -> None:
    data = toy.ToyData(40)
    data.num_workers = 3
    assert len(units_of(toy.predict(half, rows=40, data=data, queue_units=7))) == 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("trainer_inference_mode", r"got Trainer\(inference_mode=True\), under which every gradient is a silent zero"),
        (
            "trainer_use_distributed_sampler",
            r"got Trainer\(use_distributed_sampler=True\), under which ranks would share",
        ),
    ],
)
def test_trainer_flags_under_which_rows_would_be_wrong_are_errors(tmp_path: Path, flag: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy.predict(str(tmp_path / "s"), rows=10, **{flag: True})
    assert not (tmp_path / "s").exists()


def test_a_shard_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="shard '3/3': expected I/N"):
        GradientWriter("unused", shard="3/3")


def test_sigterm_finishes_the_unit_and_exits_with_75(tmp_path: Path, one_rank: Path) -> None:
    path = tmp_path / "s"

    def ask() -> None:
        while not (path / "status/c/2").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(SystemExit) as stop:
        toy.predict(str(path), rows=100, chunk_rows=8, pause_s=0.03)
    thread.join()
    assert stop.value.code == 75 and signal.getsignal(signal.SIGTERM) == before
    store = GradientStore.open(path)
    assert 0 < len(store.missing()) < 11 and list(verify(store)) == []
    assert not [name for name in files(path) if "lease" in name]
    toy.predict(str(path), rows=100)
    assert files(path) == files(one_rank)


def test_sigterm_finishes_the_unit_also_in_a_store_beside_that_alone_misses_it(tmp_path: Path) -> None:
    toy.predict(str(tmp_path / "second"), rows=100, chunk_rows=8, shard="0/2")

    def ask() -> None:
        while not (tmp_path / "first/status/c/5").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)  # unit 6 is under way, which the second store has

    both = [GradientWriter(tmp_path / name, chunk_rows=8) for name in ("first", "second")]
    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(SystemExit) as stop:
        toy.predict("unused", rows=100, pause_s=0.1, trainer_callbacks=both)
    thread.join()
    assert stop.value.code == 75
    missing = GradientStore.open(tmp_path / "first").missing()
    assert missing and min(missing) > 6 and not list(tmp_path.rglob("lease/*"))


def test_sigterm_while_another_runs_unit_is_watched_exits_with_75_at_once(tmp_path: Path, one_rank: Path) -> None:
    path = tmp_path / "s"
    toy.predict(str(path), rows=100, chunk_rows=8, shard="0/2")
    other = Holder("other", "another machine", 1, "1")  # it might be at work: its counter has to be watched
    GradientStore.open(path, "r+").storage.put("status/lease/5.0", other.to_bytes())

    def ask() -> None:
        while len(GradientStore.open(path).missing()) > 2:  # 5, and the last: Lightning first asks for one more batch
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    begun = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        toy.predict(str(path), rows=100, lease_timeout_s=60.0)
    thread.join()
    assert stop.value.code == 75 and time.monotonic() - begun < 20
    assert GradientStore.open(path).missing() == [5] and list(verify(GradientStore.open(path))) == []
    toy.predict(str(path), rows=100, lease_timeout_s=0.3)  # by now the other one is given up
    assert files(path) == files(one_rank)


def test_an_error_in_the_model_keeps_finished_units_and_gives_the_rest_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = toy.ToyExtractor.predict_step, []

    def failing(self: Any, batch: Any, batch_idx: int) -> Any:
        calls.append(batch_idx)
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(toy.ToyExtractor, "predict_step", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        toy.predict(str(tmp_path / "s"), rows=100, chunk_rows=8)
    assert GradientStore.open(tmp_path / "s").missing() == list(range(2, 13))
    toy.predict(str(tmp_path / "s"), rows=100)
    assert GradientStore.open(tmp_path / "s").missing() == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_store_the_same_bytes_as_one(tmp_path: Path, one_rank: Path, ranks: int) -> None:
    ended(run(tmp_path / "s", "--devices", str(ranks)))
    assert files(tmp_path / "s") == files(one_rank)


@pytest.mark.slow
def test_more_ranks_than_units_end_as_they_should(tmp_path: Path) -> None:
    ended(run(tmp_path / "s", "--devices", "3", "--rows", "9", "--chunk-rows", "8"))
    assert GradientStore.open(tmp_path / "s").missing() == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_two_nodes_by_torchrun_store_the_same_bytes_as_one_rank(tmp_path: Path, one_rank: Path) -> None:
    port = str(free_port())
    nodes = []
    for node in range(2):
        launcher = (
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)),
            *("--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port),
        )
        nodes.append(run(tmp_path / "s", "--nodes", "2", launcher=launcher))
    for node in nodes:
        ended(node)
    assert files(tmp_path / "s") == files(one_rank)


def slurm_job(path: Path, *options: str) -> "list[subprocess.Popen[str]]":
    """What srun starts on two nodes with one task each, both of them this machine."""
    port = str(free_port())
    job = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "icons", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": port}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    tasks = [{"SLURM_PROCID": rank, "SLURM_NODEID": rank} for rank in ("0", "1")]
    return [run(path, "--nodes", "2", *options, **job, **task) for task in tasks]


@pytest.mark.slow
def test_two_nodes_by_slurm_store_the_same_bytes_as_one_rank(tmp_path: Path, one_rank: Path) -> None:
    for task in slurm_job(tmp_path / "s"):
        ended(task)
    assert files(tmp_path / "s") == files(one_rank)


@pytest.mark.slow
def test_sigterm_to_all_tasks_of_a_slurm_job_lets_each_finish_its_unit_and_exit_with_75(
    tmp_path: Path, one_rank: Path
) -> None:
    path = tmp_path / "s"
    tasks = slurm_job(path, "--pause-s", "0.3")
    while not all((path / f"status/c/{unit}").exists() for unit in (0, 1)):
        assert tasks[0].poll() is None
        time.sleep(0.02)
    for task in tasks:
        task.terminate()
    for task in tasks:
        ended(task, status=75)
    store = GradientStore.open(path)
    assert store.missing() != [] and list(verify(store)) == []
    assert not [name for name in files(path) if "lease" in name]
    toy.predict(str(path), rows=100)
    assert files(path) == files(one_rank)


def rank_of(process: "subprocess.Popen[str]", rank: int) -> int:
    """The process that Lightning started for a rank; there may be other children."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"LOCAL_RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"rank {rank} does not run")


@pytest.mark.slow
def test_one_rank_of_two_killed_and_the_run_resumed_on_one_gives_the_same_bytes(tmp_path: Path, one_rank: Path) -> None:
    path = tmp_path / "s"
    process = run(path, "--devices", "2", "--pause-s", "1.0")  # 14 s: Lightning looks for dead ranks every 5 s
    while not (path / "status/c/1").exists():  # written by rank 1
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    process.communicate(timeout=240)
    assert process.returncode != 0 and GradientStore.open(path).missing() != []
    toy.predict(str(path), rows=100)
    assert files(path) == files(one_rank)


@pytest.mark.slow
def test_sigterm_to_the_first_of_two_ranks_stops_both_and_exits_with_75(tmp_path: Path, one_rank: Path) -> None:
    path = tmp_path / "s"
    process = run(path, "--devices", "2", "--pause-s", "0.3")
    while not (path / "status/c/1").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    ended(process, status=75)
    store = GradientStore.open(path)
    assert store.missing() != [] and list(verify(store)) == []
    toy.predict(str(path), rows=100)
    assert files(path) == files(one_rank)


@pytest.mark.slow
def test_a_store_of_something_else_stops_all_ranks_with_the_error(one_rank: Path) -> None:
    output = ended(run(one_rank, "--devices", "2", "--rows", "101"), status=1)
    assert "data.num_rows: the store" in output and "has 100, this run has 101" in output
