"""The demo's data: what its provenance says is true, and no image serves two ends."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from icons.datamodules import easy_vqa
from icons.datamodules.easy_vqa import KINDS, POOL, TASKS, DemoData, alignment_samples, make_demo_data, questions

SIZES = {"num_pool": 200, "num_validation": 20, "num_test": 40}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return make_demo_data(tmp_path_factory.mktemp("demo"), **SIZES)


@pytest.fixture(scope="module")
def pool(made: DemoData) -> list[dict[str, Any]]:
    return json.loads(made.pool.read_text())


@pytest.fixture(scope="module")
def truth() -> dict[tuple[str, str], str]:
    return {(f"train/{q.image.name}", f"<image>\n{q.text}"): q.answer for q in questions("pool")}


def turns(record: dict[str, Any]) -> tuple[str, str]:
    human, gpt = record["conversations"]
    assert (human["from"], gpt["from"]) == ("human", "gpt")
    return human["value"], gpt["value"]


def test_pool_has_the_stated_shares(pool: list[dict[str, Any]]) -> None:
    assert Counter(r["provenance"] for r in pool) == {name: round(200 * share) for name, share in POOL.items()}
    assert len({r["id"] for r in pool}) == 200
    kinds = Counter(r["kind"] for r in pool if "image" in r)
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 20


def test_provenance_tells_the_truth(pool: list[dict[str, Any]], truth: dict[tuple[str, str], str]) -> None:
    for record in pool:
        question, answer = turns(record)
        if record["provenance"] == "good":
            assert answer == truth[record["image"], question]
        elif record["provenance"] == "wrong":
            right = truth[record["image"], question]
            assert answer != right
            assert easy_vqa.kind_of(question, answer) == easy_vqa.kind_of(question, right)
        elif record["provenance"] == "text-only":
            assert "image" not in record and "<image>" not in question


def test_a_duplicate_is_a_good_record_with_its_image_hardly_changed(made: DemoData, pool: list[dict[str, Any]]) -> None:
    good = {(r["image"].split("/")[-1], *turns(r)): r for r in pool if r["provenance"] == "good"}
    for copy in (r for r in pool if r["provenance"] == "duplicate"):
        original = good[(copy["image"].split("-")[-1], *turns(copy))]
        a, b = (np.asarray(Image.open(made.images / r["image"]).convert("RGB"), float) for r in (copy, original))
        assert 0 < np.abs(a - b).mean() < 25


def test_every_named_image_is_there(made: DemoData, pool: list[dict[str, Any]]) -> None:
    files = [made.pool, *made.validation.values(), *made.test.values()]
    for record in (r for file in files for r in json.loads(file.read_text()) if "image" in r):
        assert (made.images / record["image"]).is_file()


@pytest.mark.parametrize("task", TASKS)
def test_tasks_mix_the_kinds_in_their_own_share(made: DemoData, task: str) -> None:
    for files, count in ((made.validation, 20), (made.test, 40)):
        records = json.loads(files[task].read_text())
        assert len(records) == count
        kinds = Counter(r["kind"] for r in records)
        for kind, share in TASKS[task].items():
            assert abs(kinds[kind] - count * share) <= 1


def test_no_image_serves_two_ends() -> None:
    splits = {split: {q.image for q in questions(split)} for split in easy_vqa.SPLITS}
    assert all(splits.values())
    names = list(splits)
    for i, one in enumerate(names):
        assert not any(splits[one] & splits[other] for other in names[i + 1 :])
    assert {image for image, _, _ in alignment_samples()} <= splits["alignment"]


def test_presence_questions_are_balanced_and_never_negated() -> None:
    asked = questions("validation")
    for kind in ("shape presence", "colour presence"):
        answers = Counter(q.answer for q in asked if q.kind == kind)
        assert answers["yes"] == answers["no"]
    assert not any(word in q.text.split() for q in asked for word in ("not", "no"))


def test_captions_name_the_colour_and_shape_that_the_questions_tell() -> None:
    samples = alignment_samples()
    captions = {image: text.split() for image, question, text in samples if not question}
    assert len(captions) > 1000
    for image, question, answer in samples:
        if question and answer not in ("yes", "no") and image in captions:
            assert answer in captions[image]


def test_the_same_arguments_give_the_same_bytes(made: DemoData, tmp_path: Path) -> None:
    again = make_demo_data(tmp_path / "again", **SIZES)
    other = make_demo_data(tmp_path / "other", **SIZES, seed=1)
    assert again.pool.read_bytes() == made.pool.read_bytes() != other.pool.read_bytes()
    assert again.test["general"].read_bytes() == made.test["general"].read_bytes()
