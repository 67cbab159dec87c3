import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from icons.gradients import per_sample_gradients
from icons.projection import CountSketch
from icons.scores import ScoredRows, Scorer
from icons.scores.rows import ArrayRows
from icons.scores.stderr import standard_error

TRUE_DIM, DIM, NUM_TRAIN, NUM_VALIDATION = 2000, 256, 100, 12
SEEDS = 24
"""Independent projections: the errors of one projection hang together, so many rows alone would prove little."""


def correlated(spread: float, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Training rows and tasks whose cosines reach from none to high: a few shared directions plus noise."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(4, TRUE_DIM))
    train = rng.normal(size=(NUM_TRAIN, 4)) * spread @ directions + rng.normal(size=(NUM_TRAIN, TRUE_DIM))
    tasks = {}
    for place in range(4):
        own = np.eye(4)[place] * spread + rng.normal(size=(NUM_VALIDATION, 4)) * spread / 3
        tasks[f"task {place}"] = own @ directions + rng.normal(size=(NUM_VALIDATION, TRUE_DIM))
    lengths = rng.lognormal(size=(NUM_TRAIN, 1))
    return train * lengths, tasks


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def parts(scorer: Scorer) -> list[ScoredRows]:
    return list(scorer.score(range(scorer.num_rows)))


def projection(kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind == "gaussian":
        return rng.normal(size=(TRUE_DIM, DIM)) / DIM**0.5
    if kind == "rademacher":
        return (2.0 * rng.integers(2, size=(TRUE_DIM, DIM)) - 1) / DIM**0.5
    sketch = np.zeros((TRUE_DIM, DIM))
    sketch[np.arange(TRUE_DIM), rng.integers(DIM, size=TRUE_DIM)] = rng.choice([-1.0, 1.0], size=TRUE_DIM)
    return sketch


class Stored(ArrayRows):
    """Projected rows with the exact norms that a store keeps."""

    def __init__(self, rows: np.ndarray, project: np.ndarray) -> None:
        super().__init__((rows @ project).astype(np.float32))
        self.norm = np.linalg.norm(rows, axis=1).astype(np.float32)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "count_sketch"])
@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_the_95_percent_interval_holds_the_exact_influence_19_times_in_20(kind: str, spread: float) -> None:
    hits: dict[str, list[np.ndarray]] = {"projected": [], "exact": [], "none": []}
    for seed in range(SEEDS):
        train, tasks = correlated(spread, seed)
        project = projection(kind, np.random.default_rng(100 + seed))
        cosine = np.stack([(unit(train) @ unit(rows).T).mean(axis=1) for rows in tasks.values()], axis=1)
        product = np.stack([(train @ rows.T).mean(axis=1) for rows in tasks.values()], axis=1)
        stored = {name: Stored(rows, project) for name, rows in tasks.items()}
        for normalize, found in hits.items():
            (part,) = parts(Scorer.of(Stored(train, project), stored, normalize=normalize))
            error = np.abs(part.influence.numpy() - (product if normalize == "none" else cosine))
            found.append(error <= 1.96 * part.stderr.numpy())
    for normalize, found in hits.items():
        assert 0.90 <= np.mean(found) <= 0.98, normalize


@pytest.mark.parametrize("train_projected", [True, False])
@pytest.mark.parametrize("task_projected", [True, False])
def test_standard_error_is_the_spread_over_many_projections(train_projected: bool, task_projected: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    cosine, dim, draws = 0.7, 64, 20_000
    x = torch.randn(draws, dim, generator=generator)
    y = cosine * x + (1 - cosine**2) ** 0.5 * torch.randn(draws, dim, generator=generator)
    scores = (x * y).sum(dim=1) / dim
    scores = scores / (x.norm(dim=1) / dim**0.5) if train_projected else scores
    scores = scores / (y.norm(dim=1) / dim**0.5) if task_projected else scores
    one = torch.ones(1)
    found = standard_error(torch.tensor([[cosine]]), one, one, one, dim, train_projected, task_projected)
    assert found.item() == pytest.approx(scores.std().item(), rel=0.04)


def test_the_interval_holds_for_two_checkpoints_through_one_projection() -> None:
    found = []
    for seed in range(SEEDS):
        train, tasks = correlated(0.5, seed)
        later = train + np.random.default_rng(seed).normal(size=train.shape)  # gradients a little later: much alike
        project = projection("gaussian", np.random.default_rng(100 + seed))
        exact = np.stack(
            [
                0.7 * (unit(train) @ unit(v).T).mean(axis=1) + 0.3 * (unit(later) @ unit(v).T).mean(axis=1)
                for v in tasks.values()
            ],
            axis=1,
        )
        stored = {name: [Stored(rows, project)] * 2 for name, rows in tasks.items()}
        scorer = Scorer.of([Stored(train, project), Stored(later, project)], stored, weights=[0.7, 0.3])
        (part,) = parts(scorer)
        found.append(np.abs(part.influence.numpy() - exact) <= 1.96 * part.stderr.numpy())
    assert 0.90 <= np.mean(found) <= 0.98


def test_no_projection_no_error() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    train = Stored(rows, np.eye(8))
    train.manifest = {"projector": {"kind": "identity"}}
    (part,) = Scorer.of(train, {"task": rows}).score(range(10))
    assert (part.stderr == 0).all()


@pytest.mark.parametrize("outliers", [False, True])
def test_the_interval_holds_for_a_model_s_own_gradients_at_two_checkpoints(outliers: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        models = [LlamaForCausalLM(config).eval() for _ in range(2)]
        ids = torch.randint(40, (36, 9))
    models[1].load_state_dict({name: 0.9 * value for name, value in models[0].state_dict().items()})
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), "row": torch.arange(36)}
    wholes = []
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("proj" in name)
            if outliers and "layernorm" in name:
                parameter.data[3] *= 30
        wholes.append(per_sample_gradients(model, batch))
    shapes = {name: value.shape for name, value in models[0].named_parameters() if value.requires_grad}
    units = [unit(whole.double().numpy()) for whole in wholes]
    exact = np.mean([(rows[:24] @ rows[24:].T).mean(axis=1, keepdims=True) for rows in units], axis=0)
    found = []
    for seed in range(60):
        projector = CountSketch(64, seed)
        stored = []
        for whole in wholes:
            total = projector.start(36, shapes, torch.device("cpu"))
            pieces = whole.split([shape.numel() for shape in shapes.values()], dim=1)
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
                sign = projector.sign(name, shape, piece.device)
                projector.add(total, name, piece.unflatten(1, shape) * sign)
            stored.append(total)
        pool = [ArrayRows(rows[:24]) for rows in stored]
        for rows in pool:
            rows.manifest = {"projector": projector.describe()}
        (part,) = parts(Scorer.of(pool, {"task": [rows[24:] for rows in stored]}))
        found.append(np.abs(part.influence.numpy() - exact) <= 1.96 * part.stderr.numpy())
    assert 0.91 <= np.mean(found) <= 0.98
