"""The proof on a GPU runs in its small form, so that it works the day a card is there; nothing has passed then."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
CORRECTNESS = {
    "gradients in float32", "gradients in bfloat16", "gradients in bfloat16, adapter in TF32",
    "gradients in float16", "count sketch, bit for bit",
    "two runs, bit for bit", "flash-attention", "4-bit base weights", "fused kernel", "sharded by NCCL, one rank",
}  # fmt: skip
COST = {
    "influence", "tiny LLaVA, 80 tokens", "tiny LLaVA, 120 tokens", "tiny LLaVA, 80 tokens, bf16-mixed",
    "tiny LLaVA, 80 tokens, TF32", "tiny LLaVA, 120 tokens, flash-attention", "tiny LLaVA, first pass within 80 GB",
    "tiny LLaVA, Trainer.predict", "tiny LLaVA, 80 tokens, checkpointed", "tiny LLaVA, 120 tokens, checkpointed",
}  # fmt: skip


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The command as a module, with its folder beside it importable."""
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("gpu_proof_command", SCRIPTS / "gpu_proof.py")
    assert spec is not None and spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    yield command
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_part_runs_on_the_cpu_and_none_counts_as_passed(
    proof: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_proof.py", "--small", "--json", str(tmp_path / "proof.json")])
    with pytest.raises(SystemExit) as ended:
        proof.main()
    parts = json.loads((tmp_path / "proof.json").read_text())["parts"]
    assert not ended.value.code, {name: part["reason"] for name, part in parts.items()}
    assert set(parts) == CORRECTNESS | COST
    printed = capsys.readouterr().out
    for name, part in parts.items():
        assert part["status"] in ("not shown", "not run"), name
        assert part["reason"] and part["reason"] in printed and name in printed
        assert part["status"] == "not run" or part["figures"], name
    needs_a_card = {"flash-attention", "4-bit base weights", "fused kernel", "sharded by NCCL, one rank"}
    needs_a_card.add("tiny LLaVA, 120 tokens, flash-attention")
    assert {name for name, part in parts.items() if part["status"] == "not run"} <= needs_a_card


def test_without_a_card_the_whole_proof_is_refused(
    proof: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_proof.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        proof.main()
    assert ended.value.code == 2
    assert "no CUDA device is seen; expected one of 80 GB: or try --small" in capsys.readouterr().err


def test_a_part_passes_only_within_all_of_its_limits(proof: Any) -> None:
    from gpu_proof.part import CannotRunError, Part, run

    def found(value: float, small: bool, **limits: Any) -> tuple[str, str]:
        part = Part({"error": value}, **limits)
        part.judge(small)
        return part.status, part.reason

    assert found(1.0, False, limits={"error": 1}) == ("passed", "")
    assert found(2.0, False, goals={"error": 1}) == ("failed", "error 2 > 1")
    assert found(2.0, True, goals={"error": 1})[0] == "not shown"
    assert found(2.0, True, limits={"error": 1})[0] == "failed"
    assert found(float("nan"), False, limits={"error": 1})[0] == "failed"

    def raising(error: Exception) -> Any:
        raise error

    why = run(lambda: raising(CannotRunError("no such package")), True, False)
    assert (why.status, why.reason) == ("not run", "no such package")
    why = run(lambda: raising(torch.OutOfMemoryError("asked for 9 GB\nmore")), True, False)
    assert (why.status, why.reason) == ("failed", "OutOfMemoryError: asked for 9 GB")
    assert run(lambda: Part(), True, over=True).reason == "the time was over: give more --minutes"


def test_busy_time_counts_overlapping_spans_once(proof: Any) -> None:
    from gpu_proof.cost import covered

    assert covered([(5, 6), (0, 2), (1, 3), (1.5, 2), (3, 4)]) == 5
    assert covered([]) == 0
