"""Training as LLaVA does it: against Hugging Face's loss and schedule, and a plain PyTorch loop."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from icons.modules.warmup import WarmupModule, cosine, exact_matches, hardly_moved, token_mean_loss

VOCAB = 24
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:",
    "ignore:You defined a `validation_step` but",
    "ignore:.*treespec.*:FutureWarning",
)


class Projected(nn.Module):
    """A language model with a projector in front of it that images would pass, as LLaVA has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        self.language_model = LlamaForCausalLM(config)
        self.multi_modal_projector = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        embeds = self.multi_modal_projector(self.language_model.get_input_embeddings()(input_ids))
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=use_cache)


def batch(seed: int, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 2 + row] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "row": torch.arange(rows)}


def nothing() -> dict[str, Tensor]:
    empty = {name: value[:0] for name, value in batch(0).items()}
    return empty | {"failed_row": torch.tensor([0]), "failed_status": torch.tensor([2], dtype=torch.uint8)}


def loader(batches: list[dict[str, Tensor]]) -> Any:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path, **flags: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**quiet | {"default_root_dir": folder, "enable_checkpointing": False, "max_epochs": 1} | flags)


def test_the_loss_is_hugging_faces() -> None:
    model, given = Projected().language_model, batch(1)
    expected = model(input_ids=given["input_ids"], labels=given["labels"]).loss
    logits = model(input_ids=given["input_ids"]).logits
    torch.testing.assert_close(token_mean_loss(logits, given["labels"]), expected)
    assert token_mean_loss(logits, torch.full_like(given["labels"], -100)) == 0


@pytest.mark.parametrize(("total", "ratio"), [(1, 0.03), (10, 0.0), (100, 0.03), (101, 0.03), (7, 1.0)])
def test_the_schedule_is_hugging_faces(total: int, ratio: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rising = -(-total * ratio // 1)
    expected = get_cosine_schedule_with_warmup(optimizer, int(rising), total).lr_lambdas[0]
    assert [cosine(step, total, ratio) for step in range(total + 1)] == [expected(step) for step in range(total + 1)]


def test_a_fit_takes_the_steps_of_a_plain_loop(tmp_path: Path) -> None:
    model, batches = Projected(), [batch(seed) for seed in range(8)]
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [*plain.language_model.parameters()], "lr": 1e-2},
            {"params": [*plain.multi_modal_projector.parameters()], "lr": 1e-3},
        ],
        weight_decay=0.0,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 1, 4)
    for first in range(0, 8, 2):
        for given in batches[first : first + 2]:
            logits = plain(given["input_ids"], given["attention_mask"], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten())
            (loss / 2).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    module = WarmupModule(model, learning_rate=1e-2, projector_learning_rate=1e-3, tasks=())
    fit = trainer(tmp_path, accumulate_grad_batches=2, gradient_clip_val=1.0)
    fit.fit(module, loader(batches))
    for (name, trained), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, msg=name)
    assert [group["lr"] for group in fit.optimizers[0].param_groups] == [0.0, 0.0]


def test_groups_are_named_and_only_matrices_decay(tmp_path: Path) -> None:
    module = WarmupModule(Projected(), learning_rate=3e-4, projector_learning_rate=2e-5, weight_decay=0.1, tasks=())
    module.model.language_model.lm_head.requires_grad_(False)
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(module, loader([batch(0)]))
    groups = {
        name: (group["initial_lr"], group["weight_decay"])
        for group in fit.optimizers[0].param_groups
        for name in group["param_names"]
    }
    assert list(groups) != [] and set(groups) == set(module.trained())
    assert "language_model.lm_head.weight" not in groups
    assert groups["multi_modal_projector.weight"] == (2e-5, 0.1)
    assert groups["multi_modal_projector.bias"] == (2e-5, 0.0)
    assert groups["language_model.model.norm.weight"] == (3e-4, 0.0)
    assert groups["language_model.model.layers.0.mlp.up_proj.weight"] == (3e-4, 0.1)


def losses_one_by_one(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Each sample alone, with Hugging Face's way of shifting."""
    losses, matches = [], []
    for given in batches:
        for ids, labels in zip(given["input_ids"], given["labels"], strict=True):
            logits = model(ids[None], torch.ones_like(ids)[None], use_cache=False).logits[0, :-1]
            targets = labels[1:]
            losses.append(nn.functional.cross_entropy(logits, targets).item())
            matches.append(bool((logits.argmax(-1) == targets)[targets != -100].all()))
    return sum(losses) / len(losses), sum(matches) / len(matches)


def test_tasks_are_measured_before_and_after(tmp_path: Path) -> None:
    model = Projected()
    easy, mixed = [batch(1)], [nothing(), batch(2), batch(3, rows=2)]
    start = copy.deepcopy(model)
    module = WarmupModule(model, learning_rate=1e-2, projector_learning_rate=1e-2, tasks=["easy", "mixed"])
    fit = trainer(tmp_path, max_epochs=80, num_sanity_val_steps=-1, check_val_every_n_epoch=1000)
    fit.fit(module, loader(easy), [loader(easy), loader(mixed)])
    model.eval()
    for measured, at in ((module.before, start), (module.after, model)):
        for task, batches, rows in (("easy", easy, 3), ("mixed", mixed[1:], 5)):
            loss, accuracy = losses_one_by_one(at, batches)
            assert measured[task] == {"loss": pytest.approx(loss, rel=1e-5), "accuracy": accuracy, "rows": rows}
    assert module.before["easy"]["accuracy"] == 0 and module.after["easy"]["accuracy"] == 1


def test_an_exact_match_needs_every_supervised_token() -> None:
    labels = torch.tensor([[-100, 1, 2, -100], [-100, 1, 2, -100], [-100, -100, 2, 0]])
    logits = nn.functional.one_hot(torch.tensor([[1, 2, 0, 0], [1, 0, 0, 0], [0, 2, 0, 0]]), VOCAB).float()
    assert exact_matches(logits, labels).tolist() == [1, 0, 1]


def test_a_task_without_a_readable_row_is_an_error(tmp_path: Path) -> None:
    fit = trainer(tmp_path, num_sanity_val_steps=-1)
    with pytest.raises(ValueError, match="task gqa: none of its rows can be used"):
        fit.fit(WarmupModule(Projected(), tasks=["gqa"]), loader([batch(0)]), [loader([nothing()])])


def test_a_batch_of_failed_rows_changes_nothing(tmp_path: Path) -> None:
    model = Projected()
    start = copy.deepcopy(model.state_dict())
    trainer(tmp_path).fit(WarmupModule(model, tasks=()), loader([nothing()]))
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_holds_what_was_trained_and_refuses_other_settings(tmp_path: Path) -> None:
    def module(**settings: Any) -> WarmupModule:
        model = Projected()
        model.language_model.requires_grad_(False)
        return WarmupModule(model, tasks=(), settings=settings)

    fit = trainer(tmp_path)
    fit.fit(module(seed=1, fraction=0.05), loader([batch(0)]))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"model.multi_modal_projector.{name}" for name in ("weight", "bias")}
    with pytest.raises(ValueError, match=r"fraction: the interrupted fit had 0\.05, now it is 0\.1; a fit resumes"):
        trainer(tmp_path).fit(module(seed=1, fraction=0.1), loader([batch(0)]), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"a": 2.0, "b": 1.0}, {"a": 1.79, "b": 1.0}, None),  # the mean over tasks counts
        ({"a": 2.0, "b": 1.0}, {"a": 1.9, "b": 1.0}, "fell by 2.5 %"),
        ({"a": 2.0}, {"a": 2.2}, "rose by 10.0 %"),
        ({"a": 2.0}, {"a": float("nan")}, "the loss is NaN"),
        ({"a": 2.0}, {"b": 2.0}, None),  # nothing to compare
        ({}, {}, None),
    ],
)
def test_a_warmup_that_has_learned_nothing_is_said(
    before: dict[str, float], after: dict[str, float], said: str | None
) -> None:
    warning = hardly_moved(before, after)
    assert warning is None if said is None else warning is not None and said in warning
