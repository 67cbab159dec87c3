import numpy as np
import pytest

from icons.consensus import select

SCORES = np.array([[0.1], [np.nan], [0.3], [0.2]], np.float32)


def test_a_function_orders_the_rows_and_failed_ones_are_passed_over() -> None:
    def rule(scores: np.ndarray) -> list[int]:
        assert scores is SCORES
        return [1, 3, 0, 2]

    chosen = select(SCORES, 0.5, rule)
    assert chosen.rows.tolist() == [0, 3]
    assert chosen.method.endswith(":test_a_function_orders_the_rows_and_failed_ones_are_passed_over.<locals>.rule")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0.5, 0.1], r"gave float64 of shape \(2,\); expected row numbers"),
        ([[0, 2]], r"gave int64 of shape \(1, 2\)"),
        ([0, 4], "gave row 4; expected 0 to 3"),
        ([-1], "gave row -1"),
        ([0, 2, 0], "gave row 0 more than once"),
        ([1, 2], "gave 1 row that can be selected; expected 2 or more"),
    ],
)
def test_what_is_no_order_of_rows_is_refused(order: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(SCORES, 0.5, lambda scores: order)
