"""The extractor: failed rows in place, non-finite rows told apart, and fingerprints that follow the weights."""

import pytest
import torch
from lightning import Trainer
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from icons.batch import Status
from icons.models.fingerprint import adapter_fingerprint, base_fingerprint
from icons.modules.extractor import GradientExtractor
from icons.projection import CountSketch

pytestmark = pytest.mark.filterwarnings("ignore")


def model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"])).eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(1, 13).reshape(2, 6)
    failed = {"failed_row": torch.tensor([7]), "failed_status": torch.tensor([3], dtype=torch.uint8)}
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "row": torch.tensor([5, 9]),
        **failed,
    }


def test_every_row_of_the_batch_comes_out() -> None:
    found = GradientExtractor(model(), CountSketch(16)).predict_step(batch(), 0)
    assert found["row"].tolist() == [5, 9, 7]
    assert found["status"].tolist() == [1, 1, 3]
    assert found["gradient"].shape == (3, 16)
    assert not found["gradient"][2].any()
    assert found["norm"].isnan().tolist() == found["loss"].isnan().tolist() == [False, False, True]
    assert found["tokens"].tolist() == [5, 5, 0]


def test_a_batch_whose_rows_all_failed() -> None:
    empty = {name: value[:0] if not name.startswith("failed") else value for name, value in batch().items()}
    assert GradientExtractor(model(), CountSketch(16)).predict_step(empty, 0)["row"].tolist() == [7]


def test_a_non_finite_row_fails_alone() -> None:
    broken = model()
    embedding = broken.get_input_embeddings().weight  # type: ignore[operator]
    embedding.data[12] = float("nan")  # the last id of the second row
    found = GradientExtractor(broken, CountSketch(16)).predict_step(batch(), 0)
    assert found["status"].tolist() == [1, int(Status.NON_FINITE), 3]
    assert not found["gradient"][1].any()
    assert found["norm"][1].isnan()


def test_a_row_without_a_supervised_token_is_refused() -> None:
    bad = batch()
    bad["labels"] = bad["labels"].clone()
    bad["labels"][1] = -100
    with pytest.raises(ValueError, match=r"rows \[9\] have no supervised token.*name them in failed_row"):
        GradientExtractor(model(), CountSketch(16)).predict_step(bad, 0)


def test_a_trainer_in_inference_mode_is_refused() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, inference_mode=True)
    with pytest.raises(ValueError, match=r"every gradient is a silent zero.*inference_mode=False"):
        trainer.predict(GradientExtractor(model(), CountSketch(16)), DataLoader([batch()], batch_size=None))


def test_fingerprints_follow_the_weights_and_nothing_else() -> None:
    one, two = model(), model()
    assert (base_fingerprint(one), adapter_fingerprint(one)) == (base_fingerprint(two), adapter_fingerprint(two))
    before = base_fingerprint(two), adapter_fingerprint(two)
    next(p for p in two.parameters() if p.requires_grad).data.view(-1)[0] += 1
    assert base_fingerprint(two) == before[0]
    assert adapter_fingerprint(two) != before[1]
    next(p for p in two.parameters() if not p.requires_grad).data += 1
    assert base_fingerprint(two) != before[0]
