"""The sections of the page, each from its numbers: what is shown, and the sentence that says how to read it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from icons.consensus.border import CERTAIN
from icons.report import figures
from icons.report.numbers import ScoreNumbers
from icons.report.page import Cell, Picture, Section, Table
from icons.report.rows import flat
from icons.terminal import counted

_MAX_BINS = 60
_BORDER_ROWS, _BORDER_REACH = 41, 0.05
"""Rows drawn at the border, and the share of the pool on either side of it that they are taken from."""


def votes(numbers: ScoreNumbers, fraction: float, method: str) -> Section:
    drawn = figures.vote_histogram(numbers.votes, numbers.votes_selected)
    text = [f"Each task votes for the rows at or above its own {100 * (1 - fraction):.4g}th percentile."]
    if method == "vote":
        text.append("The rows with the most votes are selected; at the border, those with the best mean rank.")
    else:
        text.append(f"The selection was made by “{method}”; votes are shown for comparison.")
    said = "; ".join(
        f"{counted(count, 'row')} with {counted(vote, 'vote')}" for vote, count in enumerate(numbers.votes.tolist())
    )
    return Section("votes", "Votes", text, [Picture(drawn, said)])


def scores(numbers: ScoreNumbers) -> Section:
    gallery = []
    for task, column, threshold in zip(
        numbers.tasks, numbers.sample_scores.T, numbers.thresholds.tolist(), strict=True
    ):
        counts, edges = _histogram(column)
        drawn = figures.score_distribution(task, counts, edges, threshold)
        said = f"{task}: scores from {column.min():.3g} to {column.max():.3g}, threshold {threshold:.3g}"
        gallery.append(Picture(drawn, said, name=task))
    key = [("chosen", "at or above the threshold: the task votes for them"), ("pool", "below"), ("accent", "threshold")]
    text = [
        "The influence of each row on each task: how well its training step goes with the steps the task's validation "
        "rows ask for. The line is the task's threshold.",
        _drawn_from(numbers),
    ]
    return Section("scores", "Scores by task", list(filter(None, text)), gallery=gallery, key=key)


def _histogram(column: Float[np.ndarray, " rows"]) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges between the 0.1st and 99.9th percentile: a single far row would squeeze the rest."""
    low, high = np.percentile(column, [0.1, 99.9])
    if not low < high:
        low, high = float(column.min()) - 0.5, float(column.max()) + 0.5
    bins = min(_MAX_BINS, max(12, round(1.5 * len(column) ** 0.5)))
    return np.histogram(column, bins, range=(float(low), float(high)))


def _drawn_from(numbers: ScoreNumbers) -> str:
    if len(numbers.sample) == numbers.num_scored:
        return ""
    return f"Drawn from a random sample of {len(numbers.sample):,} rows; all counts are of all rows."


def overlap(numbers: ScoreNumbers, fraction: float) -> Section:
    own = np.maximum(np.diag(numbers.shared), 1)
    share = numbers.shared / own[:, None]
    drawn = figures.heat_map(numbers.tasks, share)
    text = [
        "Of the rows that the task at the left votes for, the share in percent that the task below votes for too.",
        f"Chance would give {100 * fraction:.3g}: tasks that agree more ask for the same rows.",
    ]
    said = "Pairwise overlap of the tasks' own selections, in percent."
    return Section("overlap", "Overlap of tasks", text, [Picture(drawn, said)])


def specialists(numbers: ScoreNumbers, selected_share: float) -> Section:
    own = np.maximum(np.diag(numbers.shared), 1)
    kept = numbers.kept / own
    drawn = figures.specialists(numbers.tasks, kept, selected_share)
    text = [
        "A specialist selection takes one task's own best rows. The bars show how much of each the consensus keeps; "
        "the line is what a random selection of this size would.",
    ]
    if len(kept) > 1:
        low, high = int(kept.argmin()), int(kept.argmax())
        text.append(
            f"{numbers.tasks[high]} keeps most ({100 * kept[high]:.0f} %), {numbers.tasks[low]} least "
            f"({100 * kept[low]:.0f} %)."
        )
    said = "; ".join(f"{task} {100 * share:.0f} %" for task, share in zip(numbers.tasks, kept, strict=True))
    return Section("specialists", "Specialists and the consensus", text, [Picture(drawn, said)])


def composition(
    names: Sequence[str],
    pool: Float[np.ndarray, " sources"],
    chosen: Float[np.ndarray, " sources"],
    field: str | None,
    num_rows: int | None,
) -> Section:
    """`num_rows`: the size of the sample that the shares are from; None for the whole pool."""
    origin = f"the records' field “{field}”" if field else "the first folder of each image's path"
    text = [f"What pool and selection are made of, by {origin}. The method never reads it."]
    if num_rows is not None:
        text.append(f"From a random sample of {num_rows:,} rows.")
    drawn = figures.composition(names, pool, chosen)
    said = "; ".join(
        f"{name}: {100 * a:.1f} % of the pool, {100 * b:.1f} % of the selection"
        for name, a, b in zip(names, pool, chosen, strict=True)
    )
    title = f"Composition by {field}" if field else "Composition"
    return Section(f"composition-{field or 'image'}", title, text, [Picture(drawn, said)])


def border(numbers: ScoreNumbers, verdict: str) -> Section:
    """The border as each task sees it: rows around its threshold with their intervals, and a table of all rows.

    Args:
        numbers: of the score store.
        verdict: what the selection stage says about the whole selection's border.
    """
    gallery, rows = [], []
    own = np.diag(numbers.shared)
    exact = bool((np.nan_to_num(numbers.sample_stderr) == 0).all())
    for i, task in enumerate(numbers.tasks):
        threshold = float(numbers.thresholds[i])
        column, errors = numbers.sample_scores[:, i], np.nan_to_num(numbers.sample_stderr[:, i])
        if not exact:
            order = np.argsort(-column, kind="stable")
            at = int((column >= threshold).sum())
            reach = max(_BORDER_ROWS // 2, round(_BORDER_REACH * len(order)))
            low, high = max(0, at - reach), min(len(order) - 1, at + reach)
            places = np.unique(np.linspace(low, high, _BORDER_ROWS).astype(int))
            shown = order[places]
            ranks = places / len(order)
            drawn = figures.border(task, ranks, column[shown], errors[shown], threshold)
            said = f"{task}: rows around the threshold with their 95 % intervals"
            gallery.append(Picture(drawn, said, name=task))
        near = float(np.median(errors[np.argsort(np.abs(column - threshold))[: max(1, len(column) // 20)]]))
        share = numbers.certain[i] / max(own[i], 1)
        rows.append([Cell(task), Cell(f"{threshold:.4g}"), Cell(f"{near:.2g}"), Cell(f"{100 * share:.1f} %")])
    columns = ["task", "threshold", "standard error there", "votes certain at 95 %"]
    text = ["Scores of the exact influence: no projection, so no standard error. The border is exact."]
    if np.isnan(numbers.sample_stderr).all():
        text = ["The standard errors of these scores are not known, so neither is which part of the border is certain."]
    if not exact:
        text = [
            "A projection to K numbers makes every score an estimate. The bars are its 95 % intervals for rows around "
            "each task's threshold.",
            f"A vote is certain if the score lies more than {CERTAIN} standard errors above the threshold.",
            verdict,
            _drawn_from(numbers),
        ]
    key = [("chosen", "the task votes for it"), ("below", "it does not"), ("accent", "threshold")]
    return Section(
        "border", "The border", list(filter(None, text)), gallery=gallery, key=key, tables=[Table(columns, rows)]
    )


def provenance(selection: Mapping[str, Any], scores: Mapping[str, Any]) -> Section:
    """The manifests of the selection, the score store, and every gradient store that the scores came from."""
    own = {name: value for name, value in selection.items() if name not in ("scores", "health")}
    shown = {"Selection": own, "Score store": {k: v for k, v in scores.items() if k not in ("train", "tasks")}}
    for number, manifest in enumerate(scores.get("train") or []):
        several = len(scores["train"]) > 1
        shown[f"Training gradients, checkpoint {number + 1}" if several else "Training gradients"] = manifest
    for task, manifests in dict(scores.get("tasks") or {}).items():
        # `icons influence` keeps one per checkpoint, `icons score` the task vector's alone
        listed = [manifests] if isinstance(manifests, Mapping) else manifests
        for number, manifest in enumerate(listed):
            shown[f"Task {task}, checkpoint {number + 1}" if len(listed) > 1 else f"Task {task}"] = manifest
    text = ["What the numbers were made from and with: the manifests of the selection and of the stores behind it."]
    return Section("provenance", "Provenance", text, manifests={name: flat(m) for name, m in shown.items() if m})
