"""Rules by which tasks choose rows in turn."""

import numpy as np
from jaxtyping import Int

from icons.consensus.ranking import order_of
from icons.consensus.rules.evidence import Evidence


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
