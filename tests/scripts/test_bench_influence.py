"""The benchmark of influence and selection runs, at a thousandth of its size."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "bench_influence.py"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["influence", "memory", "select", "write"])
def test_it_ends_with_figures_beside_their_goals(what: str) -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), what, "--scale", "0.001"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<=" in done.stdout or ">=" in done.stdout
