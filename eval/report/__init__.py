"""Reports: scores of the base, of the erased model and of controls, as JSON, page and card."""

from erase.eval.report.report import BASE, ERASED, EvalReport
from erase.eval.report.summary import Spread, summarise
from erase.eval.scores import Score, count_score, mean_score, proportion, verdict

__all__ = [
    "BASE",
    "ERASED",
    "EvalReport",
    "Score",
    "Spread",
    "count_score",
    "mean_score",
    "proportion",
    "summarise",
    "verdict",
]
