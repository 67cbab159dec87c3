"""`icons status`: how far a store is, and what it was made from."""

import json
from typing import Any

from rich.markup import escape
from rich.table import Table

from icons.cli.console import results, say
from icons.cli.options.status import StatusOptions
from icons.partition import shard_of, slurm_array
from icons.store import open_store
from icons.store.failures import failures_of, kinds, told
from icons.store.row_store import RowStore
from icons.terminal import counted


def status(options: StatusOptions) -> int:
    """Prints the rows done, failed (with reasons) and missing, and the manifest."""
    opened = open_store(options.store)
    units = opened.missing()
    indices = _shards_with_work(units, options.shards or _stated_shards(opened))
    if options.missing:
        say(slurm_array(indices))
        return 0
    if options.as_json:
        print(json.dumps(summary(opened, units), indent=2))
        return 0
    show(opened, units, indices, options.shards or _stated_shards(opened))
    return 0


def _stated_shards(store: RowStore) -> int:
    """The number of array jobs that the store was made for; one per unit if it was not made by array jobs."""
    stated = store.facts.settings.shards or 1
    return stated if stated > 1 else store.partition.num_units


def _shards_with_work(units: list[int], shards: int) -> list[int]:
    """The array indices whose share of all units holds one of `units`."""
    return sorted({shard_of(unit, shards) for unit in units})


def summary(store: RowStore, units: list[int]) -> dict[str, Any]:
    reasons = {reason.name.lower(): len(rows) for reason, rows in store.failed().items()}
    return {
        "rows": store.counts(),
        "units": {"total": store.partition.num_units, "missing": units},
        "failed": reasons,
        "failures": [
            {"status": kind.status.name.lower(), "rows": kind.count, "examples": [str(one) for one in kind.examples]}
            for kind in kinds(failures_of(store))
        ],
        "manifest": store.manifest,
    }


def show(store: RowStore, units: list[int], indices: list[int], shards: int) -> None:
    say(repr(store))
    total = store.partition.num_units
    say(f"  units      {total - len(units):,} of {total:,} done, {counted(store.partition.chunk_rows, 'row')} each")
    for line in told(failures_of(store)):
        say(f"  {line}")
    if units:
        say(f"  missing    units {slurm_array(units)}")
        say(f"  to run     --array={slurm_array(indices)} with --shard $SLURM_ARRAY_TASK_ID/{shards}")
    table = Table("made from", "", box=None, show_header=False, padding=(0, 2))
    for name, value in store.manifest.items():
        table.add_row(escape(name), escape(json.dumps(value) if isinstance(value, (dict, list)) else str(value)))
    results.print(table, soft_wrap=True)
