"""The rules: from scores to one number per row, higher is better.

table.py        every rule by name, with what it does in a line; a new rule is a function and its entry there
evidence.py     what a rule may look at
columns.py      scores of the rows that have one: thresholds, votes, percentile ranks
aggregates.py   vote, mean, max, rank, norm, borda, direct_merge
turns.py        tasks, or single validation rows, choose in turn: round_robin, bids, round_robin_rows
balanced.py     validation rows weigh more the less they are served, round by round
coverage.py     greedy choice for the validation rows served least
likeness.py     rows like validation rows: doubly_greedy, transport; stratified
knn_kde.py      nearest neighbours, thinned where rows lie densely
herding.py      rows whose sum points where the tasks' mean gradient points
baselines.py    chance, loss, gradient norm
own.py          a rule of one's own, by import path
"""

from icons.consensus.rules.columns import Columns, threshold, voted
from icons.consensus.rules.evidence import Evidence
from icons.consensus.rules.own import OwnRule
from icons.consensus.rules.table import RULES, Rule

__all__ = ["RULES", "Columns", "Evidence", "OwnRule", "Rule", "threshold", "voted"]
