"""Samples and batches: the original's ids, labels and pixels; a row that cannot be read shifts no other."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from icons.batch import IGNORE_INDEX, Status
from icons.datamodules.dataset import ConversationDataset
from icons.datamodules.pixels import PixelMaker
from icons.datamodules.preprocessing import Preprocessing
from icons.datamodules.records import RecordIndex
from icons.models.folder import ModelFolder

ORIGINAL = Path(__file__).parents[1] / "data" / "original_llava"
TOKENS = 16  # per image, of this tiny tower
Make = Callable[..., ConversationDataset]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICONS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def llava() -> ModelFolder:
    return ModelFolder.open(ORIGINAL / "vicuna-tiny", ORIGINAL / "clip", ORIGINAL / "mm_projector.bin")


@pytest.fixture
def make(tmp_path: Path, llava: ModelFolder) -> Make:
    """A data set of the given records, in a folder with three images."""
    for place, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (20, 10 + place), colour).save(tmp_path / f"{place}.png")

    def build(records: Sequence[Any], folder: ModelFolder = llava, **settings: Any) -> ConversationDataset:
        lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in records]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        return ConversationDataset(RecordIndex(tmp_path / "data.jsonl"), tmp_path, folder, Preprocessing(**settings))

    return build


def record(question: str = "Hi", answer: str = "there", image: Any = None) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({} if image is None else {"image": image})


def test_ids_labels_and_pixels_are_the_originals(llava: ModelFolder) -> None:
    dataset = ConversationDataset(RecordIndex(ORIGINAL / "data.json"), ORIGINAL, llava, Preprocessing())
    expected = load_file(ORIGINAL / "expected.safetensors")
    for row in range(3):
        sample = dataset[row]
        ids, labels = expected[f"{row}.input_ids"][0], expected[f"{row}.labels"][0]
        place = (ids == -200).nonzero().flatten().tolist()
        if place:
            ids = torch.cat([ids[: place[0]], torch.full((TOKENS,), -200), ids[place[0] + 1 :]])
            labels = torch.cat([labels[: place[0]], torch.full((TOKENS,), IGNORE_INDEX), labels[place[0] + 1 :]])
            assert torch.equal(sample["pixel_values"], expected[f"{row}.images"])
        assert torch.equal(sample["input_ids"], ids)
        assert torch.equal(sample["labels"], labels)
        assert dataset.lengths([row]) == [len(ids)]


def test_a_batch_is_padded_on_the_right_and_keeps_images_in_row_order(make: Make) -> None:
    dataset = make(
        [
            record("<image>\nHi", image="0.png"),
            record("A longer text without an image"),
            "not json",
            record("<image>\nHi", "two words", image="2.png"),
        ]
    )
    batch = dataset.collate([dataset[row] for row in range(4)])
    assert batch["row"].tolist() == [0, 1, 3]
    assert batch["failed_row"].tolist() == [2]
    assert batch["failed_status"].tolist() == [Status.BAD_RECORD]
    for place, row in enumerate([0, 1, 3]):
        sample = dataset[row]
        size = len(sample["input_ids"])
        assert torch.equal(batch["input_ids"][place, :size], sample["input_ids"])
        assert torch.equal(batch["labels"][place, :size], sample["labels"])
        assert batch["attention_mask"][place].tolist() == [1] * size + [0] * (batch["labels"].shape[1] - size)
        assert (batch["labels"][place, size:] == IGNORE_INDEX).all()
    assert torch.equal(batch["pixel_values"], torch.cat([dataset[row]["pixel_values"] for row in (0, 3)]))


def test_a_batch_of_failed_rows_alone_is_empty(make: Make) -> None:
    dataset = make(["{", "[1]"])
    batch = dataset.collate([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == (0, 0)
    assert batch["failed_row"].tolist() == [0, 1]


BAD: dict[str, Any] = {
    "not JSON": ('{"conversations": [', Status.BAD_RECORD),
    "no object": ("[1, 2]", Status.BAD_RECORD),
    "no conversations": ({"id": "a"}, Status.BAD_RECORD),
    "empty conversations": ({"conversations": []}, Status.BAD_RECORD),
    "turns that are no objects": ({"conversations": ["a", "b"]}, Status.BAD_RECORD),
    "unknown speaker": ({"conversations": [{"from": "narrator", "value": "a"}]}, Status.BAD_RECORD),
    "a system turn alone": ({"conversations": [{"from": "system", "value": "a"}]}, Status.BAD_RECORD),
    "a value that is no text": ({"conversations": [{"from": "human", "value": 3}]}, Status.BAD_RECORD),
    "half a surrogate pair": (record("\ud83d"), Status.BAD_RECORD),
    "nested too deeply": ("[" * 100_000 + "]" * 100_000, Status.BAD_RECORD),
    "two questions": ({"conversations": [{"from": "human", "value": "a"}] * 2}, Status.BAD_RECORD),
    "image name that is no text": (record(image=3), Status.BAD_RECORD),
    "marks in two turns, one image": (
        {"image": "0.png", "conversations": record("<image>a", "b")["conversations"] * 2},
        Status.BAD_RECORD,
    ),
    "more marks than several images": (record("<image><image><image>", image=["0.png", "1.png"]), Status.BAD_RECORD),
    "no answer": ({"conversations": [{"from": "human", "value": "a"}]}, Status.NO_SUPERVISED_TOKEN),
    "empty answer": (record("a", ""), Status.NO_SUPERVISED_TOKEN),
    "missing image": (record("<image>", image="none.png"), Status.IMAGE_MISSING),
    "image outside": (record("<image>", image="../0.png"), Status.IMAGE_MISSING),
    "broken image": (record("<image>", image="data.jsonl"), Status.IMAGE_BROKEN),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_fails_with_its_reason_and_no_other_does(name: str, make: Make) -> None:
    entry, status = BAD[name]
    dataset = make([record(), entry, record()])
    assert dataset[1] == {"row": 1, "failed": status, "reason": dataset[1]["reason"], "id": dataset[1]["id"]}
    assert len(dataset[1]["reason"]) > 15
    assert dataset.lengths([0])[0] == dataset.lengths([2])[0] > 0
    assert "failed" not in dataset[0]
    assert "failed" not in dataset[2]


def test_a_record_may_have_several_images(make: Make) -> None:
    dataset = make([record("<image> or <image>?", image=["0.png", "1.png"])])
    sample = dataset[0]
    assert (sample["input_ids"] == -200).sum() == 2 * TOKENS
    assert sample["pixel_values"].shape == (2, 3, 56, 56)
    maker = PixelMaker(ORIGINAL / "clip", pad=True)
    assert torch.equal(sample["pixel_values"][1:], maker([dataset.images.open("1.png")]))


def test_images_whose_place_is_cut_away_are_left_out(make: Make) -> None:
    turns = record("<image> first", "answer")["conversations"] + record("<image> second", "more")["conversations"]
    entry = {"conversations": turns, "image": ["0.png", "1.png"]}
    whole = make([entry])[0]
    second = (whole["input_ids"] == -200).nonzero().flatten()[TOKENS].item()
    for limit, images in ((second, 1), (second + 1, 2), (second + TOKENS, 2)):
        sample = make([entry], max_length=limit)[0]
        assert torch.equal(sample["input_ids"], whole["input_ids"][:limit])
        assert len(sample["pixel_values"]) == images


def test_ids_are_cut_before_images_are_expanded_and_again_after(make: Make) -> None:
    entry = record("<image>\n" + "word " * 30, "yes", image="0.png")
    assert make([entry], max_length=60)[0]["failed"] == Status.NO_SUPERVISED_TOKEN
    entry = record("<image>\na", "yes " * 60, image="0.png")
    assert len(make([entry], max_length=80)[0]["input_ids"]) == 80


def test_the_released_preset_neither_moves_marks_nor_pads(make: Make) -> None:
    entry = record("Hi <image>", image="0.png")
    trained, released = make([entry])[0], make([entry], preset="icons-release")[0]
    assert not torch.equal(trained["input_ids"], released["input_ids"])
    assert (trained["input_ids"] == -200).nonzero()[0] < (released["input_ids"] == -200).nonzero()[0]
    assert not torch.equal(trained["pixel_values"], released["pixel_values"])


def test_a_text_model_takes_text_rows_and_fails_image_rows(make: Make, text_folder: Path) -> None:
    dataset = make([record(), record("<image>", image="0.png")], folder=ModelFolder.open(text_folder), template="chat")
    text = dataset.tokenizer.decode(dataset[0]["input_ids"])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nthere<|im_end|>\n"
    assert (dataset[1]["failed"], dataset[1]["reason"]) == (
        Status.BAD_RECORD,
        "the record has an image and the model takes none",
    )


def test_a_template_that_nothing_tells_is_asked_for(make: Make, llava: ModelFolder) -> None:
    with pytest.raises(ValueError, match=r"template auto: nothing in .* tells which conversation template"):
        make([record()], folder=replace(llava, template=""))


def test_a_template_that_does_not_fit_the_tokenizer_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"template llama_3: writes <\|start_header_id\|>"):
        make([record()], template="llama_3")


def test_an_unknown_template_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="template 'v9'; expected auto or one of v1, llama_2"):
        make([record()], template="v9")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "other"}, "preset 'other'; expected one of llava-train"),
        ({"max_length": 1}, "max_length 1; expected"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**settings)


def test_settings_survive_the_manifest() -> None:
    settings = Preprocessing(template="v1", max_length=77, preset="icons-release")
    assert Preprocessing.from_dict(json.loads(json.dumps(settings.as_dict() | {"other": 1}))) == settings


def test_the_released_preset_cuts_text_at_the_tokenizers_own_length() -> None:
    assert Preprocessing(max_length=2048, preset="icons-release").text_limit(4096) == 4096
    assert Preprocessing(max_length=2048).text_limit(4096) == 2048


def test_a_model_without_a_chat_template_is_refused(text_folder: Path, tmp_path: Path) -> None:
    (text_folder / "chat_template.jinja").unlink()
    (tmp_path / "data.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"template chat: .* brings no chat template"):
        ConversationDataset(RecordIndex(tmp_path / "data.jsonl"), None, ModelFolder.open(text_folder), Preprocessing())


@pytest.mark.parametrize("image", [False, True])
def test_llama_3_text_is_cut_where_an_image_would_still_fit(text_folder: Path, tmp_path: Path, image: bool) -> None:
    """xtuner cuts at 2,048 - 576 ids before images are expanded, in rows without one too."""
    turns = [{"from": "human", "value": "<image>\nWhat?" if image else "What?"}, {"from": "gpt", "value": "a" * 200}]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(json.dumps({"conversations": turns} | ({"image": "a.png"} if image else {})))
    folder = replace(ModelFolder.open(text_folder), image_token_id=-200, image_tokens=16)
    dataset = ConversationDataset(
        RecordIndex(tmp_path / "data.jsonl"), tmp_path, folder, Preprocessing("llama_3", max_length=100)
    )
    assert len(dataset[0]["input_ids"]) == 100 - 16 + (15 if image else 0)


def test_a_measured_row_is_tokenised_once_and_is_the_same_sample(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record("<image>\nHi", image="0.png"), "{", record("A longer text", "with an answer")]
    expected = [make(records)[row] for row in range(3)]
    dataset = make(records)
    asked: list[Any] = []
    template = dataset.maker.template  # type: ignore[union-attr]
    monkeypatch.setattr(dataset.maker, "template", lambda *given: asked.append(given) or template(*given))
    assert dataset.lengths(range(3)) == [len(sample.get("input_ids", ())) for sample in expected]
    for _ in range(2):  # the second time its tokens are no longer kept
        for row, wanted in enumerate(expected):
            found = dataset[row]
            assert found.keys() == wanted.keys()
            assert all(torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value))
                       for key, value in wanted.items() if not isinstance(value, str))  # fmt: skip
    assert len(asked) == 2 + 2 and not dataset.measured


def test_of_many_measured_rows_a_million_tokens_are_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icons.datamodules.dataset._KEPT_TOKENS", 100)
    dataset = make([record("Hi", "there" * 10)] * 30)
    lengths = dataset.lengths(range(30))
    assert sum(len(ids) for ids, _ in dataset.measured.values()) <= 100 < sum(lengths)
    dataset.lengths([29])
    assert list(dataset.measured) == [29]
