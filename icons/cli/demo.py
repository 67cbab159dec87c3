"""`icons demo`: the whole method on real data, from nothing to a selected data set, on a laptop's CPU."""

import json
import resource
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.markup import escape

from icons.cli.command_line import call
from icons.cli.console import console
from icons.cli.extras import require
from icons.cli.options.demo import DemoOptions
from icons.consensus.rules import voted
from icons.consensus.selection_file import open_selection
from icons.datamodules.easy_vqa import POOL, DemoData, make_demo_data
from icons.demo.comparison_tables import comparison_table, outcome, shares_table, votes_table
from icons.models.pinned_settings import claim
from icons.output import check_output, is_marked, mark, put
from icons.store import ScoreStore
from icons.terminal import counted

_MIB = 2**20


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides the demo's numbers. Chosen on easy-VQA images that are in none of the demo's files."""

    num_pool: int = 3000
    num_validation: int = 80
    """rows of each task's validation file"""
    num_test: int = 400
    """rows of each task's test file"""
    warmup_fraction: float = 0.1
    """of the pool: the paper's 5 % of so small a pool would be 150 rows"""
    warmup_epochs: int = 20
    warmup_batch_size: int = 64
    """meant to keep Adam's first moment, which every row shares, small beside a row's own gradient (not measured)"""
    warmup_learning_rate: float = 1e-3
    fraction: float = 0.2
    method: str = "coverage"
    """the rule that did best on pools that it was not chosen on: docs/selection_study.md"""
    drop_axes: int = 3
    """of its scores; the paper's vote, beside it, has all"""
    epochs: int = 12
    """of every fine-tune, whatever its rows, as in the paper"""
    batch_size: int = 64
    learning_rate: float = 2e-3
    projector_learning_rate: float = 2e-4
    lora_rank: int = 16
    dim: int = 5120
    seed: int = 0
    note: str = ""


QUICK = DemoSettings(
    num_pool=160, num_validation=8, num_test=16, warmup_fraction=0.4, warmup_epochs=2, epochs=2, batch_size=16,
    dim=256,
    note="a quick run, to see the stages: its numbers mean nothing",
)  # fmt: skip


def demo(options: DemoOptions) -> int:
    """Runs the method on easy-VQA: data, warm-up, gradients, influence, selection, fine-tunes, report."""
    if options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: expected at least 1 random subset to compare with")
    require("easy_vqa", "matplotlib", command="demo")
    check_output(
        options.out, kind="folder", inputs={}, ours=partial(is_marked, command="demo"), overwrite=options.overwrite
    )
    mark(options.out, "demo")
    return _Demo(options.out, QUICK if options.quick else DemoSettings(), options.seeds).run()


@dataclass
class _Demo:
    """One run of the demo: its folder, its settings, and the stages in their order."""

    out: Path
    settings: DemoSettings
    seeds: int
    seconds: dict[str, float] = field(default_factory=dict)
    """stage -> wall-clock seconds"""

    def run(self) -> int:
        """All stages, then the closing tables. The first stage that fails ends it with that stage's exit status."""
        try:
            self.stages()
        except StageFailed as failed:
            console.print(f"[red]{failed.title} ended with exit status {failed.status}[/]; the same line goes on there")
            return failed.status
        return 0

    def stages(self) -> None:
        options, data = self.settings, self.make_data()
        pool: dict[str, Any] = {"data": data.pool, "images": data.images}
        base: dict[str, Any] = {"model": self.out / "start", "images": data.images}
        lora = {"lora_rank": options.lora_rank, "lora_alpha": 2.0 * options.lora_rank, "held_out": 0.0}
        lora |= {"projector_learning_rate": options.projector_learning_rate, "min_rows": 1}
        start = self.out / "warmup"
        self.stage(
            "Warm-up", "warmup", **base, data=data.pool, out=start, fraction=options.warmup_fraction,
            task=named(data.validation, data.images), epochs=options.warmup_epochs,
            batch_size=options.warmup_batch_size, learning_rate=options.warmup_learning_rate, seed=options.seed, **lora,
        )  # fmt: skip
        train = self.out / "train.zarr"
        stores = {task: self.out / f"{task}.zarr" for task in data.validation}
        common: dict[str, Any] = {"checkpoint": start, "dim": options.dim, "batch_size": 32}
        self.stage("Gradients of the pool", "gradients", **common, **pool, out=str(train), preconditioner="adam")
        for task, file in data.validation.items():
            self.stage(
                f"Gradients of {task}", "gradients", **common, data=file, images=data.images, out=str(stores[task]),
                preconditioner="none",
            )  # fmt: skip
        scores, selected = self.out / "scores.zarr", self.out / "selected.json"
        plain, voted = self.out / "scores-plain.zarr", self.out / "vote.json"
        products: dict[str, Any] = {"train": [str(train)], "task": named(stores)}
        self.stage("Influence", "influence", **products, out=str(scores), drop_axes=options.drop_axes)
        self.stage("Influence, as in the paper", "influence", **products, out=str(plain))
        chosen: dict[str, Any] = {"data": data.pool, "fraction": options.fraction}
        self.stage("Selection", "select", **chosen, scores=str(scores), out=selected, method=options.method)
        self.stage("Selection by vote, as in the paper", "select", **chosen, scores=str(plain), out=voted)
        chosen["scores"] = str(plain)
        subsets = {"selected": [selected], "vote": [voted], "random": [], "full": [data.pool]}
        for seed in range(self.seeds):
            subsets["random"].append(self.out / f"random-{seed}.json")
            self.stage(f"Random rows {seed}", "select", **chosen, out=subsets["random"][-1], method="random", seed=seed)
        runs: dict[str, list[dict[str, float]]] = {}
        for name, files in subsets.items():
            for number, file in enumerate(files):
                title, tuned = f"Fine-tune: {name} {number}", self.out / f"tuned-{name}-{number}"
                self.stage(
                    title, "warmup", **base, data=file, out=tuned, task=named(data.test, data.images),
                    epochs=options.epochs, batch_size=options.batch_size, learning_rate=options.learning_rate,
                    seed=number, **lora,
                )  # fmt: skip
                runs.setdefault(name, []).append(accuracies(tuned))
        self.close(data, scores, selected, runs)

    def make_data(self) -> DemoData:
        """The data files and the start model; those of a former run are the same, byte for byte."""
        claim_demo(self.out, self.settings)
        console.rule("[bold]Data and start model")
        begun = time.monotonic()
        with resources.as_file(resources.files("icons") / "configs" / "demo_start") as start:
            shutil.copytree(start, self.out / "start", dirs_exist_ok=True)
        sizes = {name: getattr(self.settings, name) for name in ("num_pool", "num_validation", "num_test", "seed")}
        data = make_demo_data(self.out, **sizes)
        self.seconds["Data"] = time.monotonic() - begun
        made = ", ".join(f"{share:.0%} {name}" for name, share in POOL.items())
        console.print(f"easy-VQA in {escape(str(self.out))}: pool of {self.settings.num_pool:,} rows ({made}),")
        console.print(f"{counted(len(data.validation), 'task')}: {', '.join(data.validation)}")
        return data

    def stage(self, title: str, name: str, /, **options: Any) -> None:
        """Runs a public command, after printing the line that would repeat it.

        Raises:
            StageFailed: it ended with another exit status than 0.
        """
        console.rule(f"[bold]{title}")
        console.print(f"[dim]{escape(command_line(name, options))}[/]", soft_wrap=True)
        begun = time.monotonic()
        if status := call(name, **options):
            raise StageFailed(title, status)
        self.seconds[title] = time.monotonic() - begun

    def close(
        self,
        data: DemoData,
        scores: Path,
        selected: Path,
        runs: dict[str, list[dict[str, float]]],
    ) -> None:
        """Writes `comparison.json` and the report, and prints the closing tables."""
        records, selection = msgspec.json.decode(data.pool.read_bytes()), open_selection(selected)
        store, by_task = ScoreStore.open(str(scores)), selection.facts.thresholds
        votes = voted(np.asarray(store.influence[:]), np.array([by_task[task] for task in store.tasks])).sum(axis=1)
        content = outcome(records, selection.rows, votes, runs, self.settings.note)
        file = self.out / "comparison.json"
        put(file, json.dumps(content, indent=1) + "\n")
        page = self.out / "report.html"
        self.stage(
            "Report", "report", scores=str(scores), selection=selected, data=data.pool, out=page, images=data.images,
            source_field=["provenance", "kind"], comparison=file, title="icons demo: easy-VQA",
        )  # fmt: skip
        console.rule("[bold]Result")
        for table in (comparison_table(content), shares_table(content), votes_table(content)):
            console.print(table)
        spent = sum(self.seconds.values())
        slowest = sorted(self.seconds, key=lambda title: -self.seconds[title])[:4]
        longest = ", ".join(f"{title} {self.seconds[title]:.0f} s" for title in slowest)
        console.print(f"{spent:.0f} s ({longest}); at most {_peak_memory_mib():,} MiB of memory")
        console.print(f"The page: {escape(str(page))}", soft_wrap=True)


class StageFailed(Exception):
    """A stage ended with another exit status than 0."""

    def __init__(self, title: str, status: int) -> None:
        super().__init__(title)
        self.title, self.status = title, status


def claim_demo(out: Path, settings: DemoSettings) -> None:
    """Keeps the settings in the demo's folder, or checks that they are those of before."""
    claim(out / "demo.json", asdict(settings), "a demo")


def command_line(name: str, options: dict[str, Any]) -> str:
    """The line that repeats a call; a list is a repeated option, None is left out.

    >>> command_line("select", {"scores": "s.zarr", "num_rows": None, "task": ["a=1", "b=2"], "strict": True})
    'icons select --scores s.zarr --task a=1 --task b=2 --strict true'
    """
    words = ["icons", name]
    for option, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                text = str(one).lower() if isinstance(one, bool) else str(one)
                words += [f"--{option.replace('_', '-')}", shlex.quote(text)]
    return " ".join(words)


def named(files: dict[str, Path], images: Path | None = None) -> list[str]:
    """NAME=FILE or NAME=FILE:IMAGES, as `--task` takes them."""
    return [f"{name}={file}" + (f":{images}" if images else "") for name, file in files.items()]


def accuracies(tuned: Path) -> dict[str, float]:
    """Test accuracy per task after a fine-tune, from its folder."""
    measured = json.loads((tuned / "icons.json").read_text())["accuracy"]["after"]
    return {task: float(value) for task, value in measured.items()}


def _peak_memory_mib() -> int:
    """Most resident memory of this process so far; macOS counts bytes, Linux KiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / (_MIB if sys.platform == "darwin" else 1024))
