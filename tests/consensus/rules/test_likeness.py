import numpy as np
import pytest

from icons.consensus import select
from icons.consensus.budget import Sources

RNG = np.random.default_rng(9)
PARTS = {"0": RNG.uniform(-0.3, 0.9, size=(70, 4)).astype(np.float16), "1": RNG.uniform(-1, 0.5, size=(70, 2))}
SCORES = np.stack([part.astype(np.float32).mean(axis=1) for part in PARTS.values()], axis=1)
WHOLE = np.concatenate([part.astype(np.float16).astype(float) for part in PARTS.values()], axis=1)


def test_doubly_greedy_takes_the_rows_most_alike_to_any_validation_row() -> None:
    chosen = select(SCORES, num_rows=20, method="doubly_greedy", pairs=PARTS, weights=[1.0, 2.0])
    highest = [max(row[:4].max(), 2 * row[4:].max()) for row in WHOLE]
    assert chosen.rows.tolist() == sorted(sorted(range(70), key=lambda row: -highest[row])[:20])


@pytest.mark.parametrize("options", [{}, {"blur": 0.05, "looseness": 0.5, "steps": 40}])
def test_transport_carries_the_mass_that_pot_carries(options: dict) -> None:
    ot = pytest.importorskip("ot")
    chosen = select(SCORES, num_rows=20, method="transport", pairs=PARTS, options=options, weights=[1.0, 3.0])
    given = np.array([1 / 4 / 4] * 4 + [3 / 4 / 2] * 2)
    settings = {"blur": 0.01, "looseness": 1e-4, "steps": 10} | options
    plan = ot.unbalanced.sinkhorn_unbalanced(
        given, np.full(70, 1 / 70), (1 - WHOLE.T) / 2, reg=settings["blur"],
        reg_m=(float("inf"), settings["looseness"]), reg_type="kl", numItermax=settings["steps"], stopThr=0,
    )  # fmt: skip
    assert np.allclose(chosen.score, plan.sum(axis=0), rtol=1e-4, atol=1e-9)
    assert chosen.rows.tolist() == sorted(np.argsort(-plan.sum(axis=0))[:20].tolist())


def test_transport_refuses_what_single_precision_cannot_do_and_what_are_no_cosines() -> None:
    for options in ({"blur": 0.001}, {"steps": 0}):
        with pytest.raises(ValueError, match="transport: got blur="):
            select(SCORES, method="transport", pairs=PARTS, options=options)
    with pytest.raises(ValueError, match="the masses are not finite; expected products between -1 and 1"):
        select(SCORES, method="transport", pairs={name: 100 * part for name, part in PARTS.items()})


def test_stratified_takes_the_same_share_of_every_source() -> None:
    sources = Sources(np.array([0] * 50 + [1] * 20), ["coco", "gqa"])
    rank = select(SCORES, method="rank").score
    chosen = select(SCORES, 0.2, "stratified", budget={"sources": sources})
    best = [*np.argsort(-rank[:50])[:10], *(50 + np.argsort(-rank[50:])[:4])]
    assert chosen.rows.tolist() == sorted(best)
    with pytest.raises(ValueError, match="stratified: got no sources; expected --source-field"):
        select(SCORES, method="stratified")
