"""How much each training row helps each task: the specialist stage (arXiv 2501.00654, section 3).

scorer.py           products of training rows with
task_vectors.py     each task's mean validation row, read by
gradient_rows.py    blocks of rows from a store or an array;
uncertainty.py      the standard error that the projection leaves
datamodel.py        does influence predict what models learn?
"""

from icons.influence.scorer import Reduce, ScoredRows, Scorer, influence

__all__ = ["Reduce", "ScoredRows", "Scorer", "influence"]
