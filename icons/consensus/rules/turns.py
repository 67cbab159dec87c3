"""Rules by which tasks, or single validation rows, choose rows in turn."""

import numpy as np
from jaxtyping import Int

from icons.consensus.nearest import nearest
from icons.consensus.ranking import order_of
from icons.consensus.rules.evidence import Evidence

SHORTEST, LONGER = 64, 4
"""Lists of a validation row's best rows: at least so long, and so many times as long as its part of the choice."""


def round_robin(evidence: Evidence) -> Int[np.ndarray, " scored"]:
    """Each task in turn takes its best row that is not yet taken; minus the turn in which a row is taken.

    A task of weight w takes w rows per turn, as near as whole rows allow.
    """
    columns, weights = evidence.columns, evidence.weights
    orders = columns.each(lambda column: order_of(-column).astype(np.int32))
    taken_at = np.full(columns.num_scored, -1, np.int64)
    position, credit = [0] * columns.num_tasks, np.zeros(columns.num_tasks)
    turn, share = 0, weights / weights.max()
    while turn < columns.num_scored:
        credit += share
        for task in np.flatnonzero(credit >= 1 - 1e-9).tolist():
            credit[task] -= 1
            order, at = orders[task], position[task]
            while at < len(order) and taken_at[order[at]] >= 0:
                at += 1
            position[task] = at
            if at < len(order):
                taken_at[order[at]] = turn
                turn += 1
    return -taken_at


def bids(evidence: Evidence) -> Int[np.ndarray, " scored"]:
    """The task that is worst served so far takes its best row, again and again.

    Scores are standardised per task (mean 0, variance 1); a task is served by the sum of the chosen rows' scores, over
    its weight; of tasks served alike the first one chooses. A task whose scores are all the same chooses nothing.

    Source: arXiv 2501.12147 (BIDS), with tasks in place of its single validation rows.
    """
    columns = evidence.columns
    matrix, places = columns.scores, np.flatnonzero(columns.scored)
    moments = columns.each(lambda column: (column.mean(dtype=np.float64), column.std(dtype=np.float64)))
    mean, spread = (np.array(part) for part in zip(*moments, strict=True))
    active = np.flatnonzero((evidence.weights > 0) & (spread > 0))
    free = evidence.candidates
    total = min(evidence.wanted, int(free.sum())) if len(active) else 0
    depth = total + len(evidence.included) + len(evidence.excluded)
    orders = columns.each(lambda column: places[order_of(-column)[:depth]])
    slope = np.divide(1.0, spread * evidence.weights, where=(spread * evidence.weights) > 0, out=np.zeros(len(spread)))
    served = np.zeros(columns.num_tasks)
    for row in evidence.included.tolist():
        served += (matrix[row] - mean) * slope
    position, order = [0] * columns.num_tasks, np.empty(total, np.int64)
    for turn in range(total):
        task = int(active[served[active].argmin()])
        mine, at = orders[task], position[task]
        while not free[mine[at]]:
            at += 1
        row = mine[at]
        position[task], free[row], order[turn] = at + 1, False, row
        served += (matrix[row] - mean) * slope
    return evidence.placed(order)


def round_robin_rows(evidence: Evidence) -> Int[np.ndarray, " scored"]:
    """Each task in turn, and in each task each validation row in turn, takes the row with the highest product.

    A task of weight w takes w rows per turn, as near as whole rows allow.

    Source: arXiv 2602.14696 (round robin), with tasks that take turns whatever their number of validation rows.
    """
    pairs, ties, free = evidence.pairs, evidence.ties, evidence.candidates
    total = min(evidence.wanted, int(free.sum()))
    length = max(SHORTEST, LONGER * -(-total // pairs.width))
    of_task = [np.flatnonzero(pairs.task == task) for task in range(len(pairs.tasks))]
    next_of, credit = [0] * len(of_task), np.zeros(len(of_task))
    share = evidence.weights / evidence.weights.max()
    order: list[int] = []
    queue: list[int] = []
    while len(order) < total:
        lists = nearest(pairs, free, ties, length)
        position = [0] * pairs.width
        while len(order) < total:
            if not queue:
                credit += share
                queue = np.flatnonzero(credit >= 1 - 1e-9).tolist()
                continue
            task = queue[0]
            member = int(of_task[task][next_of[task] % len(of_task[task])])
            mine, at = lists[member], position[member]
            while at < len(mine) and not free[mine[at]]:
                at += 1
            position[member] = at
            if at == len(mine):
                break  # this list is used up: look at all rows again
            free[mine[at]] = False
            order.append(int(mine[at]))
            queue.pop(0)
            next_of[task] += 1
            credit[task] -= 1
    return evidence.placed(np.array(order, np.int64))
