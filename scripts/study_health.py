"""What the health check says of each selection of the study: a row of a table for each, to set beside its accuracy.

    python scripts/study_health.py --out study --table scripts/study_health.csv

Reads the study's folder (study_selection.py) after its fine-tunes; nothing is trained.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_table import write_table

from icons.consensus.composition import composition
from icons.consensus.health import Health
from icons.consensus.origin import scorer_of
from icons.datamodules.records import open_records
from icons.datamodules.traits import read_traits
from icons.store import ScoreStore


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = [row for folder in sorted(given.out.glob("*/*/results")) for row in measured(folder.parent)]
    if not found:
        parser.error(
            f"--out {given.out}: has no results; expected the folder of study_selection.py, after its fine-tunes"
        )
    write_table(given.table, found)


def measured(folder: Path) -> list[dict[str, Any]]:
    """The rows of one pool, one for each fine-tune; what is known of a selection is kept in `health/`."""
    found = []
    for result in sorted((folder / "results").glob("*.json")):
        content = json.loads(result.read_text())
        rows = np.array(content["rows"])
        kept = folder / "health" / result.name
        if not kept.exists() or json.loads(kept.read_text())["rows"] != content["rows"]:
            health = health_of(folder, rows)
            kept.parent.mkdir(exist_ok=True)
            known = {"rows": content["rows"], "measures": health.measures(), "warnings": health.warnings()}
            kept.write_text(json.dumps(known))
        known = json.loads(kept.read_text())
        row = {name: content[name] for name in ("data_set", "pool", "rule", "fraction", "seed")}
        measures = {name: round(value, 4) for name, value in known["measures"].items()}
        found.append(row | measures | {"warnings": len(known["warnings"])})
    return found


def health_of(folder: Path, rows: np.ndarray) -> Health:
    """The health of a selection by the pool's own scores, as `icons select` measures it."""
    store, pool = ScoreStore.open(str(folder / "scores.zarr")), open_records(folder / "pool.json")
    selected = np.zeros(store.num_rows, bool)
    selected[rows] = True
    asked = {}
    for task in store.tasks:
        records = open_records(folder / f"{task}.json")
        asked[task] = read_traits(records, range(len(records)), None)
    kinds = composition(read_traits(pool, range(store.num_rows), None), selected, asked)
    scored = np.isfinite(np.asarray(store.influence[:])).all(axis=1)
    return Health.of(rows, scored, scorer_of(store, pairwise=True), kinds=kinds)


if __name__ == "__main__":
    main()
