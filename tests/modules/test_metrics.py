import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from icons.consensus import select
from icons.consensus.overlap import task_overlap
from icons.modules.metrics import ConsensusVotes, RelativePerformance, TaskOverlap

SCORES = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
SCORES[7] = np.nan
BATCHES = torch.from_numpy(SCORES).split(64)

RANK = """
import sys, numpy as np, torch, torch.distributed as dist
from icons.modules.metrics import ConsensusVotes, RelativePerformance, TaskOverlap
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
inputs = torch.load(f"{folder}/inputs.pt", weights_only=True)
votes, overlap = ConsensusVotes(inputs["thresholds"]), TaskOverlap(inputs["thresholds"])
performance = RelativePerformance(inputs["reference"])
for batch in inputs["scores"].split(64)[rank::2]:
    votes.update(batch)
    overlap.update(batch)
performance.update(inputs["correct"][rank::2], inputs["task"][rank::2])
found = {"votes": votes.compute(), "overlap": overlap.compute(), "performance": performance.compute()}
torch.save(found, f"{folder}/found{rank}.pt")
dist.destroy_process_group()
"""


def test_votes_over_batches_are_those_of_the_whole() -> None:
    chosen = select(SCORES)
    metric = ConsensusVotes(torch.from_numpy(chosen.thresholds))
    for batch in BATCHES:
        metric.update(batch)
    scored = np.isfinite(SCORES[:, 0])
    assert metric.compute().tolist() == np.bincount(chosen.votes[scored], minlength=5).tolist()


def test_overlap_over_batches_is_that_of_the_whole() -> None:
    metric = TaskOverlap(torch.from_numpy(select(SCORES).thresholds))
    for batch in BATCHES:
        metric.update(batch)
    assert np.allclose(metric.compute().numpy(), task_overlap(SCORES, 0.2))
    nobody = TaskOverlap([1e9, 1e9, 1e9, 1e9])
    nobody.update(BATCHES[0])
    assert (nobody.compute() == 0).all()


def test_relative_performance_is_the_mean_over_tasks_not_samples() -> None:
    metric = RelativePerformance([0.8, 0.5, 0.9])
    metric.update(torch.tensor([True] * 6 + [False] * 4 + [True]), torch.tensor([0] * 10 + [1]))
    assert metric.compute().item() == pytest.approx(100 * (0.6 / 0.8 + 1 / 0.5) / 2)


def test_a_reference_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="relative performance: got reference"):
        RelativePerformance([0.5, 0.0])


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "scores": torch.from_numpy(SCORES),
        "thresholds": torch.from_numpy(select(SCORES).thresholds),
        "reference": torch.tensor([0.5, 0.7, 0.9]),
        "correct": torch.rand(101, generator=generator) < 0.6,
        "task": torch.randint(3, (101,), generator=generator),
    }
    torch.save(inputs, tmp_path / "inputs.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    votes, overlap = ConsensusVotes(inputs["thresholds"]), TaskOverlap(inputs["thresholds"])
    performance = RelativePerformance(inputs["reference"])
    votes.update(inputs["scores"])
    overlap.update(inputs["scores"])
    performance.update(inputs["correct"], inputs["task"])
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        assert torch.equal(found["votes"], votes.compute())
        assert torch.equal(found["overlap"], overlap.compute())
        assert torch.equal(found["performance"], performance.compute())
