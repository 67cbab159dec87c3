"""`icons verify`: is every chunk of a store there and whole, and does it agree with its status and the manifest?"""

from rich.progress import Progress

from icons.cli.options.verify import VerifyOptions
from icons.partition import slurm_array
from icons.store import open_store
from icons.store.layout import restore_arrays
from icons.store.storage import Storage
from icons.store.verify import Finding, verify_layout
from icons.store.verify import repair as repair_units
from icons.store.verify import verify as find
from icons.terminal import Console


def verify(options: VerifyOptions) -> int:
    """Reads the whole store: metadata, checksums, missing and swapped chunks, rows against their status, NaN, zeros."""
    mode = "r+" if options.repair else "r"
    console, storage = Console(soft_wrap=True, highlight=False), Storage(options.store, mode)
    changed = verify_layout(storage)
    for finding in changed:
        console.print(str(finding), markup=False)
    if changed and not options.repair:
        console.print(f"{len(changed)} findings; --repair restores the metadata as the store was made, and no row")
        return 1
    if changed:
        restore_arrays(storage, [finding.array for finding in changed])
        console.print(
            f"restored: the metadata of {', '.join(finding.array for finding in changed)}; no row was touched"
        )
    opened = open_store(options.store, mode)
    findings: list[Finding] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("verifying", total=opened.partition.num_units)
        for finding in find(opened, on_unit=lambda: progress.advance(bar)):
            findings.append(finding)
            console.print(str(finding), markup=False)
    units = sorted({finding.unit for finding in findings if finding.unit is not None})
    if options.repair:
        repair_units(opened, findings)
        console.print(f"repaired: {len(units)} units are marked as not written ({slurm_array(units) or 'none'})")
        return 0 if all(finding.unit is not None for finding in findings) else 1
    if findings:
        console.print(f"{len(findings)} findings in {len(units)} units; --repair marks these units as not written")
        return 1
    counts = opened.counts()
    console.print(f"sound: {counts['done']:,} rows done, {counts['failed']:,} failed, {counts['missing']:,} missing")
    return 0
