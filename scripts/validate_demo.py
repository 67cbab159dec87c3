"""Does influence predict, on the demo's model and data? Makes the tables of docs/measured.md with `icons` commands.

python scripts/validate_demo.py --out validation_demo --workers 2

Data: as `icons demo` makes it, but with a pool of 1,000 rows, and validation files of 200; no test image is used.
The same line, run again, goes on where it was interrupted.
"""

import argparse
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from icons.cli import call
from icons.datamodules.easy_vqa import make_demo_data

NUM_POOL, NUM_VALIDATION = 1000, 200
LORA: dict[str, Any] = {"lora_rank": 16, "lora_alpha": 32.0}
WARMUP: dict[str, Any] = {"fraction": 0.1, "epochs": 10, "batch_size": 16, "learning_rate": 5e-4}
TRAININGS: dict[str, Any] = {"epochs": 4, "batch_size": 32, "learning_rate": 1e-3, "lora_dropout": 0.0}
EXACT = {"exact, Adam": "adam", "exact, plain": "none", "exact, diagonal": "diagonal", "exact, sign": "sign"}
DOT = {"dot product, Adam": "adam", "dot product, plain": "none"}
DIMS = (256, 1024, 5120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("validation_demo"))
    parser.add_argument("--subsets", type=int, default=60)
    parser.add_argument("--counterfactual-seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    out: Path = given.out
    trainer = {"accelerator": "cpu", "enable_progress_bar": False}
    data = make_demo_data(
        out, num_pool=NUM_POOL, num_validation=NUM_VALIDATION, num_test=NUM_VALIDATION, test="development"
    )
    with resources.as_file(resources.files("icons") / "configs" / "demo_start") as start:
        shutil.copytree(start, out / "start", dirs_exist_ok=True)
    files = [f"{task}={file}:{data.images}" for task, file in data.validation.items()]
    done(
        "warmup", model=out / "start", data=data.pool, images=data.images, out=out / "warmup", task=files, min_rows=1,
        projector_learning_rate=2e-4, trainer=trainer, **WARMUP, **LORA,
    )  # fmt: skip
    common: dict[str, Any] = {"images": data.images, "batch_size": 32, "trainer": trainer}
    stores: dict[str, Path] = {}
    for names, normalize in ((EXACT, "exact"), (DOT, "none")):
        for name, preconditioner in names.items():
            stores[name] = out / f"{normalize}-{preconditioner}.zarr"
            done(
                "score", checkpoint=[out / "warmup"], data=data.pool, task=files, out=stores[name], normalize=normalize,
                preconditioner=preconditioner, task_vectors=out / f"vectors-{normalize}", **common,
            )  # fmt: skip
    for dim in DIMS:
        rows = {"train": data.pool, **data.validation}
        for name, file in rows.items():
            done(
                "gradients", checkpoint=out / "warmup", data=file, out=str(out / f"{name}-{dim}.zarr"), dim=dim,
                preconditioner="adam" if name == "train" else "none", **common,
            )  # fmt: skip
        stores[f"projected, Adam, K {dim:,}"] = out / f"projected-{dim}.zarr"
        done(
            "influence", train=[str(out / f"train-{dim}.zarr")], out=str(out / f"projected-{dim}.zarr"),
            task=[f"{task}={out / f'{task}-{dim}.zarr'}" for task in data.validation],
        )  # fmt: skip
    return call(
        "validate", model=out / "start", data=data.pool, images=data.images, out=out / "validation", task=files,
        scores=[f"{name}={store}" for name, store in stores.items()], subsets=given.subsets, workers=given.workers,
        counterfactual_seeds=given.counterfactual_seeds, trainer=trainer, **TRAININGS, **LORA,
    )  # fmt: skip


def done(command: str, **options: Any) -> None:
    """Calls a command; ends this process with its exit status if that is not 0."""
    if status := call(command, **options):
        raise SystemExit(status)


if __name__ == "__main__":
    raise SystemExit(main())
