"""The SLURM files for warm-up, fine-tune and export, run as they stand with a pretended srun."""

import os
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parent.parent.parent / "scripts" / "slurm"
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def submit(tmp_path: Path) -> Path:
    """A folder that a job is submitted from: `icons` and `scontrol` write down their words."""
    programs = {
        "bin/srun": SRUN,
        "bin/scontrol": '#!/usr/bin/env bash\necho "scontrol $*" >>said\n',
        ".venv/bin/icons": '#!/usr/bin/env bash\necho "icons $*" >>said\nexit "${STATUS:-0}"\n',
    }
    for name, text in programs.items():
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    (tmp_path / "scripts").symlink_to(SLURM.parent)
    return tmp_path


def run(submit: Path, name: str, *words: str, status: int = 0) -> tuple[int, list[str]]:
    slurm = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(submit)}
    environment = os.environ | slurm | {"STATUS": str(status), "PATH": f"{submit / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(SLURM / name), *words], env=environment, check=False, cwd="/")
    return done.returncode, (submit / "said").read_text().splitlines()


@pytest.mark.parametrize("name", ["warmup.sbatch", "finetune.sbatch"])
def test_a_fit_runs_on_all_nodes(submit: Path, name: str) -> None:
    said = ["icons warmup --config a b.yaml --trainer.num_nodes 2 --trainer.devices 8"]
    assert run(submit, name, "--config", "a b.yaml") == (0, said)


@pytest.mark.parametrize("name", ["warmup.sbatch", "finetune.sbatch"])
@pytest.mark.parametrize(("status", "requeued"), [(75, ["scontrol requeue 17"]), (1, [])])
def test_an_interrupted_fit_is_queued_again_and_a_failed_one_is_not(
    submit: Path, name: str, status: int, requeued: list[str]
) -> None:
    code, said = run(submit, name, status=status)
    assert (code, said[1:]) == (status, requeued)


def test_an_export_is_one_task(submit: Path) -> None:
    said = ["icons export --checkpoint final --out merged"]
    assert run(submit, "export.sbatch", "--checkpoint", "final", "--out", "merged") == (0, said)
