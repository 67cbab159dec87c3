"""`icons verify`: is every chunk of a store there and whole, and does it agree with its status and the manifest?"""

from rich.progress import Progress

from icons.cli.console import console, say
from icons.cli.options.verify import VerifyOptions
from icons.partition import slurm_array
from icons.store import open_store
from icons.store.layout import restore_arrays
from icons.store.storage import Storage
from icons.store.verify import Finding, verify_layout
from icons.store.verify import repair as repair_units
from icons.store.verify import verify as find
from icons.terminal import Console, counted


def verify(options: VerifyOptions) -> int:
    """Reads the whole store: metadata, checksums, missing and swapped chunks, rows against their status, NaN, zeros."""
    mode = "r+" if options.repair else "r"
    storage = Storage(options.store, mode)
    changed = verify_layout(storage)
    for finding in changed:
        say(str(finding))
    if changed and not options.repair:
        say(f"{counted(len(changed), 'finding')}; --repair restores the metadata as the store was made, and no row")
        return 1
    if changed:
        restore_arrays(storage, [finding.array for finding in changed])
        say(f"restored: the metadata of {', '.join(finding.array for finding in changed)}; no row was touched")
    opened = open_store(options.store, mode)
    findings: list[Finding] = []
    with Progress(console=Console(stderr=True), transient=True, disable=console.quiet) as progress:
        bar = progress.add_task("verifying", total=opened.partition.num_units)
        for finding in find(opened, on_unit=lambda: progress.advance(bar)):
            findings.append(finding)
            say(str(finding))
    units = sorted({finding.unit for finding in findings if finding.unit is not None})
    if options.repair:
        repair_units(opened, findings)
        say(f"repaired: {counted(len(units), 'unit')} marked as not written ({slurm_array(units) or 'none'})")
        return 0 if all(finding.unit is not None for finding in findings) else 1
    if findings:
        say(
            f"{counted(len(findings), 'finding')} in {counted(len(units), 'unit')}; "
            "--repair marks such units as not written"
        )
        return 1
    counts = opened.counts()
    say(f"sound: {counted(counts['done'], 'row')} done, {counts['failed']:,} failed, {counts['missing']:,} missing")
    return 0
