"""The page holds every section, says what could not be shown, and shows data as text."""

from pathlib import Path

import numpy as np
import pytest

from icons.consensus.selection_file import SavedSelection, open_selection
from icons.report.build import Chosen, Pool, build, images_in
from icons.report.page import Page, render
from icons.report.sections import provenance
from icons.store import ScoreStore

TASKS = ["vqav2", "gqa", "textvqa", "pope", "mmbench"]
BROKEN, MISSING, UNREADABLE = 7, 8, 9


@pytest.fixture(scope="module")
def page(scores: ScoreStore, chosen: Chosen, pool: Pool, results_file: Path, validation_file: Path) -> Page:
    return build(
        scores,
        chosen,
        pool,
        source_fields=["provenance.kind"],
        comparison_file=results_file,
        validation_file=validation_file,
    )


def test_every_section_is_there_in_the_order_of_the_method(page: Page) -> None:
    assert [section.id for section in page.sections] == [
        *("results", "votes", "scores", "overlap", "specialists", "composition-provenance.kind", "border"),
        *("rows", "validation", "provenance"),
    ]
    for section in page.sections:
        if section.id in ("scores", "border"):
            assert [picture.name for picture in section.gallery] == TASKS


def test_the_head_says_what_failed_and_what_was_warned_of(page: Page) -> None:
    assert {fact.label: fact.value for fact in page.facts} == {
        "rows in the pool": "300",
        "tasks": "5",
        "selected": "60",
        "certain at 95 %": "71.7 %",
        "wrong answers": "33 → 12 %",
    }
    assert page.notices == [
        "1 row failed and cannot be selected: 1 image missing.",
        "the warm-up's loss has hardly moved",
        "1 × image missing, for example row 10: its image is missing",
    ]


def test_highest_rows_come_with_text_image_or_the_reason_for_none(page: Page, scores: ScoreStore) -> None:
    (section,) = [section for section in page.sections if section.id == "rows"]
    influence = scores.influence[:]
    for task, ends in enumerate(section.ends[1:]):
        assert [row.row for row in ends.highest[:3]] == [BROKEN, MISSING, UNREADABLE]
        assert ends.lowest[0].row == int(np.nanargmin(influence[:, task]))
        assert ends.lowest[0].score == f"{np.nanmin(influence[:, task]):.4g}"
    broken, missing, unreadable, good = section.ends[1].highest
    assert broken.problem == "image coco/7.png cannot be decoded"
    assert missing.problem == "image vg/8.png is not in the image folder"
    assert unreadable.problem == "this record cannot be read"
    assert good.image.startswith("data:image/jpeg") or "image" not in good.turns[0].text
    assert good.selected and good.votes == 5 and good.stderr == "0.004"


def test_the_consensus_shows_its_best_and_its_rejected_rows(page: Page, scores: ScoreStore, chosen: Chosen) -> None:
    (section,) = [section for section in page.sections if section.id == "rows"]
    influence = scores.influence[:]
    mean, votes = influence.mean(axis=1), (influence >= chosen.thresholds).sum(axis=1)
    scored = [row for row in range(len(mean)) if np.isfinite(mean[row])]
    best = sorted((row for row in scored if chosen.selected[row]), key=lambda row: (-votes[row], -mean[row], row))
    last = sorted((row for row in scored if not chosen.selected[row]), key=lambda row: (votes[row], mean[row], row))
    ends = section.ends[0]
    assert ends.task == "consensus"
    assert [row.row for row in ends.highest] == best[:4] and all(row.selected for row in ends.highest)
    assert [row.row for row in ends.lowest] == last[:4] and not any(row.selected for row in ends.lowest)
    assert ends.lowest[0].score == f"{mean[last[0]]:.4g}" and ends.lowest[0].stderr == ""


def test_text_of_records_is_escaped(page: Page) -> None:
    html = render(page)
    assert "<b>" not in html.split("<main>")[1].replace('<div class="meta"><b>', "")
    assert "&lt;b&gt;" in html and "&lt;i&gt;wrong answer&lt;/i&gt;" in html


def test_a_selection_of_other_scores_is_refused(scores: ScoreStore, selection: Path) -> None:
    saved = open_selection(selection)
    other = SavedSelection(saved.rows, saved.manifest | {"num_rows": 301})
    with pytest.raises(ValueError, match=r"made from 301 rows and the tasks vqav2, .* have 300 rows and vqav2"):
        Chosen.of(other, scores)
    other = SavedSelection(saved.rows, saved.manifest | {"thresholds": {"gqa": 0.1}})
    with pytest.raises(ValueError, match=r"the tasks gqa; the scores .* give the store that it was selected from"):
        Chosen.of(other, scores)


def chosen_of(selected: np.ndarray, threshold: float, method: str) -> Chosen:
    return Chosen(selected, {"method": method, "fraction": 0.2, "thresholds": {"gqa": threshold}})


def test_one_task_needs_no_overlap(tmp_path: Path, pool: Pool) -> None:
    store = ScoreStore.create(tmp_path / "one.zarr", num_rows=20, tasks=["gqa"])
    values = np.linspace(-1, 1, 20, dtype=np.float32)[:, None]
    store.write_unit(0, values, np.zeros_like(values), np.ones(20, np.uint8))
    selected = np.arange(20) >= 16
    page = build(ScoreStore.open(tmp_path / "one.zarr"), chosen_of(selected, 0.6, "mean"), pool)
    assert [section.id for section in page.sections] == [
        *("votes", "scores", "specialists", "composition-image", "border", "rows", "provenance")
    ]
    (border,) = [section for section in page.sections if section.id == "border"]
    assert not border.gallery and "exact" in border.text[0]
    assert "made by “mean”" in page.sections[0].text[1]


def test_an_unfinished_store_is_said_to_be_one(tmp_path: Path, pool: Pool) -> None:
    store = ScoreStore.create(tmp_path / "half.zarr", num_rows=20, tasks=["gqa"], chunk_rows=10)
    values = np.linspace(-1, 1, 10, dtype=np.float32)[:, None]
    store.write_unit(0, values, np.zeros_like(values), np.ones(10, np.uint8))
    page = build(ScoreStore.open(tmp_path / "half.zarr"), chosen_of(np.zeros(20, bool), 0.6, "vote"), pool)
    assert page.notices == ["The score store is not finished: 10 rows are missing."]


@pytest.mark.parametrize("value", [None, "", " None ", "nan", [], [None]])
def test_the_ways_of_having_no_image(value: object) -> None:
    assert images_in({"image": value}) == []


def test_provenance_shows_every_store_behind_the_scores() -> None:
    store = {"path": "a.zarr", "projector": {"kind": "count_sketch", "dim": 8}}
    scores = {"format": 1, "train": [store, store], "tasks": {"gqa": [store, store], "pope": [store]}}
    section = provenance({"method": "vote", "scores": scores}, scores)
    assert list(section.manifests) == [
        *("Selection", "Score store", "Training gradients, checkpoint 1", "Training gradients, checkpoint 2"),
        *("Task gqa, checkpoint 1", "Task gqa, checkpoint 2", "Task pope"),
    ]
    assert section.manifests["Selection"] == [("method", "vote")]
    assert ("projector.dim", "8") in section.manifests["Task pope"]
    exact = provenance({"method": "vote"}, {"format": 1})
    assert list(exact.manifests) == ["Selection", "Score store"]


def test_provenance_of_exact_scores_shows_each_task_vector() -> None:
    vector = {"num_rows": 80, "data": {"fingerprint": "ab12"}}
    section = provenance({"method": "vote"}, {"format": 1, "tasks": {"gqa": vector}})
    assert section.manifests["Task gqa"] == [("num_rows", "80"), ("data.fingerprint", "ab12")]
