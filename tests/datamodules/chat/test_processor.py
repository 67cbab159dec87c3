"""Any image-text model by its own processor: LLaVA-NeXT's here, whose images become a varying number of tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from icons.batch import IGNORE_INDEX, Status, model_inputs
from icons.datamodules.chat.processor import ProcessorSamples
from icons.datamodules.chat.skeleton import TemplateError
from icons.datamodules.chat.templates import Turn
from icons.datamodules.dataset import ConversationDataset
from icons.datamodules.images import FailedRowError
from icons.datamodules.preprocessing import Preprocessing
from icons.datamodules.records import RecordIndex
from icons.models.folder import ModelFolder

WIDE, HIGH = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 40), "blue")
ASKED = [Turn(True, "<image>\nWhat?"), Turn(False, "A dog."), Turn(True, "and <image>?"), Turn(False, "Yes")]


@pytest.fixture
def samples(image_text_folder: Path) -> ProcessorSamples:
    return ProcessorSamples(image_text_folder, ModelFolder.open(image_text_folder).image_token_id)


def answers(samples: ProcessorSamples, sample: dict[str, Any]) -> str:
    kept = sample["labels"] != IGNORE_INDEX
    assert torch.equal(sample["labels"][kept], sample["input_ids"][kept])
    return str(samples.tokenizer.decode(sample["labels"][kept]))


def test_answers_are_supervised_wherever_the_images_are(samples: ProcessorSamples) -> None:
    sample = samples(ASKED, [WIDE, HIGH], 2048)
    assert answers(samples, sample) == "A dog.<|im_end|>Yes<|im_end|>"
    text = "".join(f"<|im_start|>{'user' if turn.human else 'assistant'}\n{turn.text}<|im_end|>\n" for turn in ASKED)
    oracle = samples.processor(text=[text], images=[[WIDE, HIGH]], return_tensors="pt")
    for name in ("input_ids", "pixel_values", "image_sizes"):
        assert torch.equal(sample[name], oracle[name][0] if name == "input_ids" else oracle[name])


def test_text_alone_needs_no_image(samples: ProcessorSamples) -> None:
    sample = samples([Turn(True, "Hi"), Turn(False, "there")], [], 2048)
    assert answers(samples, sample) == "there<|im_end|>"
    assert set(sample) == {"input_ids", "labels"}


def test_images_without_a_mark_are_left_out(samples: ProcessorSamples) -> None:
    assert "pixel_values" not in samples([Turn(True, "Hi"), Turn(False, "there")], [WIDE], 2048)


def test_more_marks_than_images_are_a_bad_record(samples: ProcessorSamples) -> None:
    with pytest.raises(FailedRowError, match="2 image marks for 1 image") as failure:
        samples(ASKED, [WIDE], 2048)
    assert failure.value.status == Status.BAD_RECORD


def test_text_may_be_cut_and_images_not(samples: ProcessorSamples) -> None:
    whole = samples(ASKED, [WIDE, HIGH], 2048)
    length = len(whole["input_ids"])
    assert torch.equal(samples(ASKED, [WIDE, HIGH], length - 3)["input_ids"], whole["input_ids"][: length - 3])
    with pytest.raises(FailedRowError, match="cuts an image") as failure:
        samples(ASKED, [WIDE, HIGH], 20)
    assert failure.value.status == Status.TOO_LARGE


def test_a_template_that_drops_texts_is_refused(image_text_folder: Path) -> None:
    (image_text_folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content | length }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="writes no conversation that holds its question and answer"):
        ProcessorSamples(image_text_folder, None)


def test_the_models_image_mark_in_a_text_fails_its_row(image_text_folder: Path) -> None:
    samples = ProcessorSamples(image_text_folder, None)
    samples.chat.mark = samples.processor.image_token = "<|mark|>"
    with pytest.raises(TemplateError, match=r"a text holds <\|mark\|>, the model's mark for an image"):
        samples([Turn(True, "What is <|mark|>?"), Turn(False, "A mark.")], [], 2048)


def test_a_template_that_leaves_out_an_image_fails_the_row(samples: ProcessorSamples) -> None:
    samples.chat.template = samples.chat.template.replace("<image>", "{{ '<image>' if loop.first }}")
    with pytest.raises(TemplateError, match="has a place for 1 of 2 images"):
        samples([Turn(True, "<image>a<image>"), Turn(False, "b")], [WIDE, HIGH], 2048)


def test_a_tokenizer_without_offsets_gives_the_same_labels(samples: ProcessorSamples) -> None:
    whole = samples(ASKED, [WIDE, HIGH], 2048)
    samples.tokenizer = SlowTokenizer(samples.tokenizer)
    assert torch.equal(samples(ASKED, [WIDE, HIGH], 2048)["labels"], whole["labels"])


class SlowTokenizer:
    """One that does not tell which characters its tokens came from."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.bos_token = fast.bos_token


def test_a_batch_holds_whatever_the_processor_gives(image_text_folder: Path, tmp_path: Path) -> None:
    for name, image in (("wide", WIDE), ("high", HIGH), ("whole", Image.new("RGB", (56, 56)))):
        image.save(tmp_path / f"{name}.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    records: list[dict[str, Any]] = [{"image": f"{name}.png", "conversations": turns} for name in ("wide", "whole")]
    records.append({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "you"}]})
    records.append({"image": "none.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    folder = ModelFolder.open(image_text_folder)
    dataset = ConversationDataset(RecordIndex(tmp_path / "data.json"), tmp_path, folder, Preprocessing())
    batch = dataset.collate([dataset[row] for row in range(4)])
    assert batch["row"].tolist() == [0, 1, 2]
    assert batch["failed_status"].tolist() == [Status.IMAGE_MISSING]
    assert batch["image_sizes"].tolist() == [[20, 40], [56, 56]]
    assert batch["pixel_values"].shape == (2, 5, 3, 28, 28)
    assert (batch["pixel_values"][0, 3:] == 0).all()
    assert set(model_inputs(batch)) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    assert dataset.lengths([0, 1, 2, 3]) == [*batch["attention_mask"].sum(dim=1).tolist(), 0]


def test_a_template_of_llavas_is_refused(image_text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"template 'v1': .* expected chat"):
        ConversationDataset(
            RecordIndex(tmp_path / "data.jsonl"), None, ModelFolder.open(image_text_folder), Preprocessing("v1")
        )
