import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

SCRIPTS = Path(__file__).parents[2] / "scripts" / "peers"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in (
        "questions",
        "task",
        "result",
        "run",
        "kfac",
        "training",
        "make_task",
        "make_images",
        "cost",
        "table",
        "repeat",
    ):
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


def test_rows_are_padded_to_the_longest_or_to_a_length_and_keep_their_images() -> None:
    from task import collate

    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "pixel_values": torch.ones(1, 3, 2, 2)},
        {"input_ids": [8], "labels": [8]},
    ]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["pixel_values"].shape == (1, 3, 2, 2) and "pixel_values" not in collate(rows[1:])
    assert collate(rows[1:], length=4)["labels"].tolist() == [[8, -100, -100, -100]]


def test_embeddings_give_the_loss_that_words_and_images_give() -> None:
    from task import collate, embedded, losses_of

    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2
        ),
        image_token_index=4,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    ids = [1, 4, 4, 4, 4, 5, 6]
    rows = [
        {"input_ids": ids, "labels": [-100] * 5 + ids[5:], "pixel_values": torch.randn(1, 3, 4, 4)},
        {"input_ids": [1, 7, 8], "labels": [-100, 7, 8]},
    ]
    expected = losses_of(model, collate(rows))
    found = losses_of(model, collate([embedded(model, row) for row in rows]))
    torch.testing.assert_close(found, expected)


def test_costs_are_the_slope_between_two_pools() -> None:
    from cost import per_1000_rows, sizes_of

    costs = [{"cpu_seconds": 5.0, "bytes": 1e6}, {"cpu_seconds": 8.0, "bytes": 4e6}]
    assert per_1000_rows(costs, (500, 2000)) == (2.0, 2.0)
    assert sizes_of(("tool", "slow", (32, 128)), (64, 256)) == (32, 128)
    assert (
        sizes_of(("tool", "slow", (250, 1000)), (64, 256)) == sizes_of(("tool", "quick", None), (64, 256)) == (64, 256)
    )


def test_scores_of_equal_values_may_differ_in_bits() -> None:
    from repeat import compared

    one = np.array([0.0, 2.0])
    assert compared(one, one.copy()) == {"same bits": True, "largest difference": "0.0e+00"}
    assert compared(one, np.array([-0.0, 2.0])) == {"same bits": False, "largest difference": "0.0e+00"}
    assert compared(one, np.array([0.0, 1.0])) == {"same bits": False, "largest difference": "5.0e-01"}


def test_a_wrong_answer_counts_for_the_task_of_its_kind_and_a_duplicate_for_none() -> None:
    from make_images import judged

    assert judged({"kind": "shape presence", "provenance": "wrong"}) == {
        "kind": "presence", "provenance": "wrong", "wrong": True
    }  # fmt: skip
    assert judged({"kind": "colour", "provenance": "duplicate"})["kind"] == ""
    assert judged({"kind": "text", "provenance": "text-only"}) == {
        "kind": "",
        "provenance": "text-only",
        "wrong": False,
    }
