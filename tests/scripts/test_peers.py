import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts" / "peers"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("questions", "task", "result", "run", "kfac"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_wrong_answers_are_wrong_and_one_in_ten_of_each_kind() -> None:
    from questions import CONTINENTS, SHARES, cities, draw_pool

    known = cities()
    pool = draw_pool(500, cities(), 0)
    assert len(pool) == 500
    for kind, share in SHARES.items():
        own = [one for one in pool if one.kind == kind]
        assert len(own) == 500 * share and sum(one.wrong for one in own) == len(own) / 10
    for one in (one for one in pool if one.kind == "city"):
        right = {continent for name, continent in known if f" {name}?" in one.text}
        assert one.answer in CONTINENTS and (one.wrong or one.answer in right)
        assert not one.wrong or right != {one.answer}


def test_tasks_ask_in_a_wording_that_the_pool_has_not() -> None:
    from questions import TASKS, cities, draw_pool, draw_task

    asked = {one.text for one in draw_pool(500, cities(), 0)}
    for kind in TASKS:
        assert not asked & {one.text for one in draw_task(kind, 60, cities(), 0)}


def test_scores_of_validation_rows_are_averaged_within_their_task(tmp_path: Path) -> None:
    from result import mean_by_task
    from task import Task

    row = {"input_ids": [1], "labels": [1]}
    (tmp_path / "tokens.json").write_text(json.dumps({"pool": [row] * 2, "a": [row], "b": [row] * 2}))
    found = mean_by_task(Task(tmp_path), np.array([[1.0, 2.0, 4.0], [5.0, 6.0, 6.0]]))
    assert found.tolist() == [[1.0, 3.0], [5.0, 6.0]]


def test_turned_is_a_change_of_basis_on_both_sides() -> None:
    from kfac import turned

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(3, 4, 5, generator=generator)
    left, right = torch.randn(4, 4, generator=generator), torch.randn(5, 5, generator=generator)
    expected = torch.einsum("og,boi,ia->bga", left, blocks, right)
    torch.testing.assert_close(turned(blocks, left, right), expected)
    torch.testing.assert_close(turned(blocks, None, None), blocks)


def test_only_seeds_that_every_subset_was_trained_with_count(tmp_path: Path) -> None:
    from run import losses
    from task import Task

    (tmp_path / "lora").mkdir()
    found = {"0/0": [1.0], "1/0": [2.0], "0/1": [3.0]}
    (tmp_path / "lora" / "losses.json").write_text(json.dumps(found))
    places, mean, each = losses(Task(tmp_path), "lora")
    assert places == [0, 1] and mean.tolist() == [[1.0], [2.0]] and len(each) == 1
