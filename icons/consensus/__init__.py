"""Scores per task -> votes -> the selected rows: the generalist stage (arXiv 2501.00654, section 3).

votes.py            each task votes for its best rows; those with most votes are selected
rules/              the vote, and the other ways to one number per row, by
ranking.py          exact, stable ranks, and
pairs.py            products with single validation rows, the
nearest.py          highest of them; what they are made of:
origin.py           gradient stores behind a score store,
unit_rows.py        their rows, normalised
budget.py           how many rows, and which: tokens, quotas, lists
duplicates.py       near-duplicates of better rows
health.py           marks of selections that fail: hurt validation rows and redundancy against
random_sets.py      random sets,
composition.py      sources, answers and questions against pool and tasks
border.py           which part of a selection is certain
overlap.py          of two selections, and of the tasks
selection_file.py   a selection on disk
"""

from icons.consensus.pairs import Pairs
from icons.consensus.votes import METHODS, Scores, Selection, matrix_of, select

__all__ = ["METHODS", "Pairs", "Scores", "Selection", "matrix_of", "select"]
