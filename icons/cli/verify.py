"""`icons verify`: is every chunk of a store there and whole, and does it agree with its status and the manifest?"""

from rich.progress import Progress

from icons.cli.options.verify import VerifyOptions
from icons.partition import slurm_array
from icons.store import open_store
from icons.store.verify import Finding
from icons.store.verify import repair as repair_units
from icons.store.verify import verify as find
from icons.terminal import Console


def verify(options: VerifyOptions) -> int:
    """Reads the whole store: checksums, missing chunks, shapes, rows against their status, NaN, rows of zeros."""
    console, opened = (
        Console(soft_wrap=True, highlight=False),
        open_store(options.store, "r+" if options.repair else "r"),
    )
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
