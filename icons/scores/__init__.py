"""How much each training row helps each task: the specialist stage (arXiv 2501.00654, section 3).

scorer.py           products of training rows, at every
checkpoint.py       of the warm-up, with
task_means.py       each task's mean validation row, read by
axes.py             leading axes that scores can leave out, and
span.py             the spans of validation rows that they can be taken within;
rows.py             blocks of rows from a store or an array;
stderr.py           the standard error that the projection leaves
"""

from icons.scores.scorer import ScoredRows, Scorer, influence

__all__ = ["ScoredRows", "Scorer", "influence"]
