"""The benchmarks of influence and selection run, at a thousandth of their size."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
LINES = [["bench_influence.py", what] for what in ("influence", "memory", "select")] + [["bench_selection.py"]]


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_it_ends_with_figures_beside_their_goals(line: list[str]) -> None:
    command = [sys.executable, "-W", "error", str(SCRIPTS / line[0]), *line[1:], "--scale", "0.001"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<=" in done.stdout or ">=" in done.stdout
