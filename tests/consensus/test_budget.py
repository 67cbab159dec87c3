import numpy as np
import pytest

from icons.consensus import select
from icons.consensus.budget import Budget, Sources

SCORES = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
SOURCES = Sources(np.arange(100) % 4, ["coco", "gqa", "ocr", "text"])


def chosen(**budget: object) -> list[int]:
    return select(SCORES, fraction=0.2, budget=budget).rows.tolist()


def test_lists_are_kept_and_the_size_stays() -> None:
    plain = chosen()
    out = next(row for row in range(100) if row not in plain)
    with_lists = chosen(include=[out], exclude=plain[:3])
    assert out in with_lists and not set(plain[:3]) & set(with_lists) and len(with_lists) == 20


def test_a_source_gets_its_share_at_most_and_the_best_of_the_others_follow() -> None:
    limited = chosen(source_quotas={"coco": 0.1, "gqa": 0.0}, sources=SOURCES)
    counts = np.bincount(SOURCES.code[limited], minlength=4)
    assert counts[0] <= 2 and counts[1] == 0 and len(limited) == 20
    whole = select(SCORES, fraction=0.2)
    order = sorted(range(100), key=lambda row: (-whole.votes[row], -whole.percentile_rank[row], row))
    greedy, room = [], {0: 2, 1: 0}
    for row in order:
        code = int(SOURCES.code[row])
        if len(greedy) < 20 and room.get(code, 20) > 0:
            room[code] = room.get(code, 20) - 1
            greedy.append(row)
    assert limited == sorted(greedy)


def test_a_task_gets_its_share_at_least() -> None:
    voted = np.flatnonzero(SCORES[:, 1] >= np.percentile(SCORES[:, 1], 80))
    assert len(set(chosen(task_quotas={"1": 0.9})) & set(voted.tolist())) >= 18
    plain = set(chosen())
    satisfied = len(plain & set(voted.tolist())) / 20
    assert set(chosen(task_quotas={"1": satisfied / 4})) == plain


def test_tokens_are_spent_in_order_until_the_next_row_would_not_fit() -> None:
    tokens = np.arange(100) + 1
    whole = select(SCORES, fraction=0.2)
    order = sorted(range(100), key=lambda row: (-whole.votes[row], -whole.percentile_rank[row], row))
    expected, spent = [], 0
    for row in order[:20]:
        if spent + tokens[row] > 400:
            break
        spent += tokens[row]
        expected.append(row)
    assert chosen(max_tokens=400, tokens=tokens) == sorted(expected)
    assert chosen(max_tokens=0, tokens=tokens) == []


CASES = [
    ({"include": [3], "exclude": [3]}, r"rows \[3\]: are both to be included and to be excluded"),
    ({"max_tokens": 5}, "token budget: got no tokens per row"),
    ({"task_quotas": {"1": 1.5}}, "quota of 1: got 1.5"),
    ({"include": [100]}, r"rows to include: got \[100\]; expected 0 to 99"),
    ({"exclude": [-1]}, r"rows to exclude: got \[-1\]; expected 0 to 99"),
    ({"source_quotas": {"vg": 0.5}, "sources": SOURCES}, "source 'vg': no record has it; expected one of coco, gqa"),
]


@pytest.mark.parametrize(("budget", "message"), CASES)
def test_budgets_that_cannot_be_kept_are_refused(budget: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(**budget)


def test_a_failed_row_cannot_be_included() -> None:
    scores = SCORES.copy()
    scores[7] = np.nan
    with pytest.raises(ValueError, match=r"rows to include: \[7\] have no score"):
        select(scores, budget={"include": [7]})


def test_a_budget_says_whether_it_bounds_more_than_the_number() -> None:
    assert not Budget(5, exclude=[1]).is_bounded and Budget(5, include=[1]).is_bounded
