"""The benchmark of the rules runs, at a five-thousandth of its size."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "bench_rules.py"


@pytest.mark.slow
def test_it_ends_with_figures_beside_their_goals(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), "--out", str(tmp_path), "--scale", "0.0002"]
    done = subprocess.run([*command, "--rule", "coverage", "--rule", "herding"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<= 900") == 2
