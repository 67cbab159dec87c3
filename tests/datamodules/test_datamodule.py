"""The data module: the batches of predict, fit and validation."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from icons.datamodules.datamodule import ConversationDataModule
from icons.datamodules.preprocessing import Preprocessing
from icons.models.folder import ModelFolder
from icons.partition import Partition, UnitPlan

ROWS = 11


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICONS_CACHE", str(tmp_path / "cache"))
    records: list[Any] = [
        {"conversations": [{"from": "human", "value": "Hi " * row}, {"from": "gpt", "value": f"answer {row}"}]}
        for row in range(ROWS)
    ]
    records[4] = {"conversations": []}
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def module(data: Path, folder: Path, **options: Any) -> ConversationDataModule:
    return ConversationDataModule(data, model_folder=ModelFolder.open(folder), batch_size=3, **options)


def rows_of(loader: Any) -> list[int]:
    batches = list(loader)
    return [row for batch in batches for row in batch["row"].tolist() + batch["failed_row"].tolist()]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_predict_gives_every_row_once_failed_ones_too(data: Path, text_folder: Path, workers: int) -> None:
    loader = module(data, text_folder, num_workers=workers).predict_dataloader()
    assert sorted(rows_of(loader)) == list(range(ROWS))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_read_the_same_under_each_start_method(data: Path, image_text_folder: Path, method: str) -> None:
    loader = module(data, image_text_folder).predict_dataloader()
    others = DataLoader(
        loader.dataset,
        sampler=loader.sampler,
        batch_size=None,
        collate_fn=loader.collate_fn,
        num_workers=1,
        multiprocessing_context=method,
    )
    for mine, other in zip(loader, others, strict=True):
        assert torch.equal(mine["input_ids"], other["input_ids"]) and mine["failed_reason"] == other["failed_reason"]


def test_a_data_set_travels_as_its_arguments(data: Path, image_text_folder: Path) -> None:
    dataset = module(data, image_text_folder).dataset
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3]["input_ids"], dataset[3]["input_ids"])
    assert again[4] == dataset[4] and again.dialect is dataset.dialect


def test_predict_keeps_to_the_units_of_the_plan(data: Path, text_folder: Path) -> None:
    datamodule = module(data, text_folder)
    datamodule.plan = UnitPlan(Partition(ROWS, 4), [2, 0])
    batches = [
        sorted(batch["row"].tolist() + batch["failed_row"].tolist()) for batch in datamodule.predict_dataloader()
    ]
    assert sorted(batches[0]) == [8, 9, 10]
    assert sorted(row for batch in batches[1:] for row in batch) == [0, 1, 2, 3]


def test_batches_keep_to_the_token_limit(data: Path, text_folder: Path) -> None:
    datamodule = module(data, text_folder, max_tokens=200)
    for batch in datamodule.predict_dataloader():
        assert batch["input_ids"].numel() <= 200


def test_fit_gives_the_chosen_rows_in_an_order_of_the_seed(data: Path, text_folder: Path) -> None:
    chosen = [1, 2, 3, 5, 8]
    found = [rows_of(module(data, text_folder, rows=chosen, seed=seed).train_dataloader()) for seed in (0, 0, 1)]
    assert sorted(found[0]) == chosen
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_validation_has_one_loader_per_task_and_one_for_the_held_out(data: Path, text_folder: Path) -> None:
    datamodule = module(data, text_folder, tasks={"a": (data, None), "b": (data, None)}, held_out=[7, 3])
    loaders = datamodule.val_dataloader()
    assert [sorted(rows_of(loader)) for loader in loaders] == [list(range(ROWS)), list(range(ROWS)), [3, 7]]


def test_the_manifests_part_names_data_and_preprocessing(data: Path, text_folder: Path) -> None:
    described = module(data, text_folder, preprocessing=Preprocessing(max_length=99)).describe()
    assert described["data"]["num_rows"] == ROWS
    assert described["preprocessing"] == {"template": "chat", "max_length": 99, "preset": "llava-train"}, "not auto"
    before = described["data"]["fingerprint"]
    data.write_text(data.read_text().replace("answer 3", "answer 4"))
    assert module(data, text_folder).describe()["data"]["fingerprint"] != before


def test_the_same_row_is_the_same_sample_in_every_batch(data: Path, text_folder: Path) -> None:
    datamodule = module(data, text_folder)
    for batch in datamodule.predict_dataloader():
        for place, row in enumerate(batch["row"].tolist()):
            size = int(batch["attention_mask"][place].sum())
            assert torch.equal(batch["input_ids"][place, :size], datamodule.dataset[row]["input_ids"])
